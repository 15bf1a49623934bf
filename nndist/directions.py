"""Infer from a score's name whether higher or lower is better."""

from __future__ import annotations

import re
from typing import Literal

Direction = Literal["highest", "lowest"]

LOWEST_IS_BEST = re.compile(
    "loss|losses|error|errors|err|perplexity|ppl|nll|mse|mae|mape|rmse|rmsle|smape|distance|divergence|kl|crossentropy|"
    "xent|bce|deviation|residual|regret|cost|penalty|bits|bpc|bpb|bpd|wer|cer|ter|fid|kid|brier|ece|calibration"
)
HIGHEST_IS_BEST = re.compile(
    "accuracy|acc|f1|fbeta|iou|miou|dice|jaccard|auc|auroc|auprc|aucpr|precision|recall|sensitivity|specificity|bleu|"
    "rouge|meteor|chrf|r2|psnr|ssim|snr|sdr|map|ap|ndcg|mrr|kappa|mcc|correlation|pearson|spearman|reward|return|"
    "likelihood|match|hits"
)


def direction_of(score: str) -> Direction | None:
    """Whether highest or lowest is best for a score, by its name; None if the name does not tell.

    The last part of the name that tells decides: "test/loss/generator" is a loss, "test/accuracy_top5" an accuracy; the
    set's name is ignored. A part that says both ("accuracy_error") tells nothing.
    """
    first, *parts = score.split("/")
    for part in reversed(parts or [first]):
        spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", part).lower()
        words = set(re.findall(r"[a-z]+\d*", spaced))
        words |= {word.rstrip("0123456789") for word in words}
        if {"cross", "entropy"} <= words:
            words.add("crossentropy")
        lowest, highest = any(map(LOWEST_IS_BEST.fullmatch, words)), any(map(HIGHEST_IS_BEST.fullmatch, words))
        if words & {"negative", "neg"}:  # negative_log_likelihood, neg_mean_squared_error
            lowest, highest = highest, lowest
        if lowest != highest:
            return "lowest" if lowest else "highest"
        if lowest:
            return None
    return None
