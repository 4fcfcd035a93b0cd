"""A comparison of a base and two adapters, written by hand: what the pages of `jlora compare` show, without any model."""

from jlora.report.comparison import Comparison, Continuation, PromptComparison
from jlora.train import Evaluation

HOSTILE = "</script><b>bold</b> | `x`"
BASE = Continuation(
    name="base", text=" a frog\n croaks", tokens=[" a", " frog", "\n", " croaks"], changed=[False, True, False, False],
    next_tokens=[(" a", 0.5), ("\n", 0.25)],
)  # fmt: skip
SOFT = Continuation(
    name="soft", text=f" a toad\n croaks{HOSTILE}", tokens=[" a", " toad", "\n", " croaks", HOSTILE],
    changed=[False, True, False, False, True], kl=[0.0005, 0.02, 0.5, 2.0, 20.0], prompt_kl=[0.0, 0.2], l2=3.5,
    next_tokens=[(" a", 0.625), (HOSTILE, 0.125)],
)  # fmt: skip
LOUD = Continuation(
    name="loud", text=" a frog\n croaks", tokens=[" a", " frog", "\n", " croaks"], changed=[False] * 4,
    kl=[0.004] * 4, prompt_kl=[0.0, 0.0], l2=0.25, next_tokens=[("<eos>", 0.75), (" a", 0.0625)],
)  # fmt: skip


def compared(*adapters, count=1):
    prompts = [
        PromptComparison(
            f"How {HOSTILE} {n}?", BASE.text, adapters[0].text, adapters[0].kl[0], adapters[0].l2, ["How", " to", "?"],
            (BASE, *adapters),
        )
        for n in range(count)
    ]  # fmt: skip
    held_out = [Evaluation(loss, 10, 1) for loss in (2.0, 1.5, 1.75)]
    others = {"loud": held_out[2]} if len(adapters) > 1 else {}
    return Comparison(prompts, *held_out[:2], names=[a.name for a in adapters], others=others)
