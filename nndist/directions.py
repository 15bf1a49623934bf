"""Infer from a score's name whether higher or lower is better."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
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

OF_A_CLASS = re.compile(
    "accuracy|acc|f1|fbeta|iou|dice|jaccard|auc|auroc|auprc|precision|recall|sensitivity|specificity|ap"
)
NEGATIVE = ("negative", "neg")
COUNTED_UP_TO = re.compile("(fpr|fnr|fdr|far|frr)_at_|(time|seconds|hours|steps|epochs)_to_")
"""What is lowest at best where another score reaches a value: fpr_at_95_recall, time_to_accuracy."""
ONE_MINUS = re.compile("(one|1)_minus_.*|1-[a-z]+[0-9]*")


def direction_of(score: str) -> Direction | None:
    """Whether highest or lowest is best for a score, by its name; None if the name does not tell.

    The last part of the name that tells decides: "test/loss/generator" is a loss, "test/accuracy_top5" an accuracy; the
    set's name is ignored. A part that says both ("accuracy_error") tells nothing.
    """
    first, *parts = score.split("/")
    for part in reversed(parts or [first]):
        spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", part.replace("IoU", "Iou")).lower()
        if COUNTED_UP_TO.match(spaced):
            return "lowest"
        spoken = re.findall(r"[a-z]+\d*", spaced)
        words = {*spoken, *(word.rstrip("0123456789") for word in spoken)}
        if {"cross", "entropy"} <= words:
            words.add("crossentropy")
        lowest, highest = any(map(LOWEST_IS_BEST.fullmatch, words)), any(map(HIGHEST_IS_BEST.fullmatch, words))
        if _is_negated(spoken, words):
            if highest and not lowest and "likelihood" not in words:
                return None  # neg_reward: a reward, negated, or that for negative examples
            lowest, highest = highest, lowest
        if ONE_MINUS.fullmatch(spaced):
            lowest, highest = highest, lowest
        if highest and "gap" in words:
            return None  # between two accuracies: whose, the name does not tell
        if lowest != highest:
            return "lowest" if lowest else "highest"
        if lowest:
            return None
    return None


def _is_negated(spoken: Sequence[str], words: Collection[str]) -> bool:
    """Whether a score is the negative of what it names: negative_log_likelihood, neg_mean_squared_error.

    Not one of the negative class, such as recall_negative, negative_f1 or loss_neg.
    """
    if any(map(OF_A_CLASS.fullmatch, words)):
        return False
    if spoken[:1] and spoken[0] in NEGATIVE:
        return True
    after = next((place for place, word in enumerate(spoken) if word in NEGATIVE), len(spoken))
    return "likelihood" in spoken[after:]
