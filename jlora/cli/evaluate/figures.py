"""The figures of an evaluation, as JSON and as lines for people."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from jlora._typing import JsonObject
from jlora.cli.evaluate.answers import Answered, Asked
from jlora.cli.evaluate.judging import Verdicts
from jlora.cli.evaluate.options import Evaluate
from jlora.evaluation import LEVEL, Results, Sandbox, reasons
from jlora.train import Evaluation


class Figures(NamedTuple):
    """All that was measured."""

    options: Evaluate
    base: str
    models: Sequence[str]
    losses: Mapping[str, Evaluation]
    """By model; none without --perplexity."""
    of_data: JsonObject
    """What is said of the split that the losses are of."""
    asked: Asked | None
    answers: Mapping[str, Answered]
    results: Results | None
    verdicts: Sequence[Verdicts]
    sandbox: Sandbox

    def to_json(self) -> JsonObject:
        """Of one model with its figures at the top, of several with those of each under its name."""
        o, adapters = self.options, self.options.adapter
        report: JsonObject = {
            "model": self.base,
            "adapter": adapters[0] if len(adapters) == 1 else list(adapters) or None,
            "data": o.data,
            "split": o.split,
        }
        if len(self.models) == 1:
            report |= self._of_model(self.models[0])
        else:
            report["models"] = {name: self._of_model(name) for name in self.models}
        report |= self.of_data
        if self.asked is not None:
            report["answers"] = {
                "examples": len(self.asked.examples),
                "left_out": reasons(self.asked.left_out),
                "each": o.answers,
                "max_new_tokens": o.max_new_tokens,
                "temperature": o.temperature,
            }
            report["bootstrap"] = {"resamples": o.bootstrap, "level": LEVEL, "seed": o.sampling_seed}
        if self.results is not None and len(self.models) > 1:
            report["differences"] = [
                {"of": of, "minus": minus, "metrics": {name: e._asdict() for name, e in metrics.items()}}
                for (of, minus), metrics in self.results.differences.items()
            ]
        if self.verdicts:
            report["judge"] = {"model": o.judge_model, "url": o.judge, "pairs": [v.to_json() for v in self.verdicts]}
        if self.sandbox.measures:
            report["sandbox"] = {
                **self.sandbox.measures, "seconds": self.sandbox.seconds, "megabytes": self.sandbox.megabytes,
            }  # fmt: skip
        return report

    def _of_model(self, name: str) -> JsonObject:
        found: JsonObject = {}
        if name in self.losses:
            loss = self.losses[name]
            found |= {
                "eval_loss": loss.loss,
                "perplexity": loss.perplexity,
                "batches": loss.batches,
                "supervised_tokens": loss.supervised_tokens,
            }
        if self.results is not None:
            found["metrics"] = {
                metric: estimate._asdict() | self._remarks(name, metric)
                for metric, estimate in self.results.estimates[name].items()
            }
            found["cut_at_max_new_tokens"] = self.answers[name].cut
        return found

    def _remarks(self, name: str, metric: str) -> JsonObject:
        assert self.results is not None and self.asked is not None
        said = self.results.counts[name][metric].said
        unscored = self.results.unscored(name, metric, self.asked.examples)
        return ({"unscored": unscored} if unscored else {}) | ({"remark": said} if said else {})

    def examples(self) -> Iterator[JsonObject]:
        """A line for each record of the split that was asked, and for each that could not be."""
        assert self.asked is not None and self.results is not None
        each = {
            name: {metric: counts.each() for metric, counts in of.items()} for name, of in self.results.counts.items()
        }
        for i, example in enumerate(self.asked.examples):
            line: JsonObject = {
                "where": example.where,
                "prompt": example.prompt,
                "references": list(example.references),
            }
            line["answers"] = {name: self.answers[name].texts[i] for name in self.models}
            line["scores"] = {name: {m: values[i] for m, values in of.items()} for name, of in each.items()}
            for what in ("unscored", "notes"):
                said = {
                    name: {m: getattr(counts, what)[i] for m, counts in of.items() if i in getattr(counts, what)}
                    for name, of in self.results.counts.items()
                }
                line |= {what: {name: of for name, of in said.items() if of}} if any(said.values()) else {}
            if self.verdicts:
                line["judge"] = {
                    v.of: v.judgements[i]._asdict() | {"score": v.judgements[i].score} for v in self.verdicts
                }
            yield line
        for where, why in self.asked.left_out.items():
            yield {"where": where, "left_out": why}

    def lines(self) -> Iterator[str]:
        """What is to be said below the table."""
        if self.asked is not None and self.results is not None:
            yield from self._of_answers(self.asked, self.results)
        for verdicts in self.verdicts:
            yield from self._judged(verdicts)
        if self.sandbox.measures:
            yield "Code ran " + "; ".join(
                f"{what} bounded by {' and '.join(by)}" if by else f"{what} NOT bounded: run it in a container"
                for what, by in self.sandbox.measures.items()
            )

    def _judged(self, verdicts: Verdicts) -> Iterator[str]:
        of = verdicts.to_json()
        if of["examples"]:
            yield (
                f"Judged by {self.options.judge_model}: {of['of']} against the {of['against']} wins {of['win_rate']:.1%} "
                f"({of['low']:.1%} … {of['high']:.1%}): {of['wins']} wins, {of['ties']} ties, {of['losses']} losses; of the ties "
                f"{of['followed_the_order']} went by the order of the answers."
            )
        yield from (f"{of['of']}, not judged: {_reason(reason)}" for reason in verdicts.unscored)

    def _of_answers(self, asked: Asked, results: Results) -> Iterator[str]:
        o = self.options
        how = "greedy" if o.temperature == 0 else f"temperature {o.temperature:g}" if o.temperature else "sampled"
        yield (
            f"{len(asked.examples):,} records, {o.answers} answer{'s' * (o.answers > 1)} to each, {how}, at most "
            f"{o.max_new_tokens} tokens; {LEVEL:.0%} intervals of {o.bootstrap:,} bootstrap resamples."
        )
        yield from (f"Not asked: {_reason(reason)}" for reason in reasons(asked.left_out))
        unscored: dict[str, dict[str, list[str]]] = {}
        for name, answered in self.answers.items():
            if answered.cut:
                yield f"{name}: {answered.cut:,} answers were cut at {o.max_new_tokens} tokens; raise --max-new-tokens."
            for metric in results.metrics:
                remarks = self._remarks(name, metric)
                for reason in remarks.get("unscored", ()):
                    unscored.setdefault(_reason(reason), {}).setdefault(metric, []).append(name)
                if "remark" in remarks:
                    yield f"{name}, {metric}: {remarks['remark']}."
        for reason, metrics in unscored.items():
            named = (m if len(of) == len(self.models) else f"{m} ({', '.join(of)})" for m, of in metrics.items())
            yield f"Not scored by {', '.join(named)}: {reason}"


def _reason(of: JsonObject) -> str:
    return f"{of['count']:,}, since {of['why']} (first: {of['first']})."
