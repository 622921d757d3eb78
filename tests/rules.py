"""Every rule of pruning, in each form that takes a way of its own through the code.

Tests of what all rules promise run with these: a rule that is added here is tested everywhere, and one of the package that is
missing here fails `pruning/test_rules.py`. Limits are such that pictures of some 16 to 64 tokens lose some in every layer.
"""

from madtp.pruning import ATM, MADTP, EViT, MADTPNearest, PiToMe, Random, RankedNovelty, ToMe, TopK

RULES = {
    "madtp": MADTP(temperature=3.0),
    "madtp nearest": MADTPNearest(temperature=3.0),
    "topk": TopK(drop=0.3),
    "random": Random(drop=0.3),
    "evit": EViT(shares=(0.3,)),
    "ranked novelty": RankedNovelty(thresholds=(0.3,)),
    "ranked novelty, shares": RankedNovelty(shares=(0.3,)),
    "ranked novelty, importance": RankedNovelty(counts=(4,), order="importance"),
    "ranked novelty, second look": RankedNovelty(thresholds=(0.3,), second_look=1.0),
    "tome": ToMe(counts=(4,)),
    "tome, authors' order": ToMe(counts=(4,), authors_order=True),
    "atm": ATM(thresholds=(0.4,)),
    "pitome": PiToMe(shares=(0.2,)),
    "pitome, protect": PiToMe(shares=(0.2,), form="protect"),
}
