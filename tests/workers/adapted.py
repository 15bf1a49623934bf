"""Run by test_lora: the recipe of `tuned`, to whose layers peft adds LoRA; FAULT befalls it as it does `resumable`."""

from dataclasses import dataclass

from workers.resumable import Resumable
from workers.tuned import Tuned


@dataclass(kw_only=True)
class Adapted(Tuned):
    """Which of four numbers is the largest, by LoRA."""

    ema_decay: float | None = 0.9

    def networks(self):
        from peft import LoraConfig, get_peft_model

        layers = {"target_modules": r"0\.0|1", "modules_to_save": ["3"]}
        config = LoraConfig(r=2, lora_alpha=4, **layers)
        return {"model": get_peft_model(super().networks()["model"], config)}

    def loss(self, networks, batch):
        Resumable.suffer(self, batch[1])
        return super().loss(networks, batch)
