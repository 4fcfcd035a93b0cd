"""Fine-tuning runs on a 4-bit base, and the commands around them."""

import json

import numpy as np
import peft
import pytest
import torch
import transformers
from tiny import read_log

import jlora
from jlora.cli import main
from jlora.runs.log import Log

pytestmark = pytest.mark.usefixtures("quick_compilation")
FLAGS = "--steps 6 --rank 4 --learning-rate 1e-2 --batch-size 2 --max-length 32 --eval-every 3".split()


@pytest.fixture(scope="module")
def packed_dir(llama_dir, tmp_path_factory):
    """The tiny Llama, quantized by the command."""
    directory = tmp_path_factory.mktemp("packed") / "llama"
    main(["quantize", "--model", llama_dir, "--output", str(directory), "--dtype", "float32"])
    return str(directory)


def finetune(model, data, output, *flags):
    main(["finetune", "--model", model, "--data", data, "--output", str(output), *FLAGS, *flags])
    return read_log(output)


@pytest.mark.slow
def test_a_packed_directory_and_packing_while_loading_are_one(llama_dir, packed_dir, text_file, tmp_path, capsys):
    on_load = finetune(llama_dir, text_file, tmp_path / "a", "--quantize", "nf4")
    shown = capsys.readouterr().out
    from_file = finetune(packed_dir, text_file, tmp_path / "b")
    dense = finetune(llama_dir, text_file, tmp_path / "c")
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in (on_load, from_file, dense)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    assert abs(losses[0][0] - losses[2][0]) > 1e-5, "a 4-bit base is not the dense one"
    assert losses[0][-1] < losses[0][0]
    assert "nf4" in shown and "bits a parameter" in shown
    assert "MiB predicted" in shown and "MiB in the compiled step" in shown

    flags = [
        "--adapter",
        str(tmp_path / "a" / "adapter"),
        "--data",
        text_file,
        "--batch-size",
        "2",
        "--max-length",
        "32",
    ]
    reports = []
    for more in (["--quantize", "nf4"], ["--model", packed_dir]):
        capsys.readouterr()
        main(["evaluate", *flags, *more])
        reports.append(json.loads(capsys.readouterr().out))
    np.testing.assert_allclose([r["eval_loss"] for r in reports], on_load[-1]["eval_loss"], rtol=1e-5)


@pytest.mark.slow
def test_the_adapter_gives_the_same_logits_in_peft(packed_dir, text_file, tmp_path):
    """Kernels 32 wide straddle blocks, which bitsandbytes decodes wrongly on CPU: so on a dense copy of the packed base."""
    finetune(packed_dir, text_file, tmp_path / "run")
    model, params = jlora.load(packed_dir, dtype="float32")
    jlora.save_pretrained(tmp_path / "dense", model, params)
    params = jlora.load_adapter(tmp_path / "run" / "adapter", params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "run" / "adapter").eval()
    ids = np.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(model.apply({"params": params}, ids), expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("form", [pytest.param("stacked", marks=pytest.mark.slow), "per-layer"])
def test_a_stopped_run_on_a_packed_base_ends_as_if_it_had_not(llama_dir, text_file, tmp_path, form, monkeypatch):
    flags = ("--quantize", "nf4", "--form", form, "--checkpoint-every", "2", "--dropout", "0.1")
    finetune(llama_dir, text_file, tmp_path / "whole", *flags)
    append = Log.append

    def stop_at_four(self, entry):
        entry = append(self, entry)
        if entry["step"] == 4:
            raise RuntimeError("the power went")
        return entry

    monkeypatch.setattr(Log, "append", stop_at_four)
    with pytest.raises(SystemExit):
        finetune(llama_dir, text_file, tmp_path / "cut", *flags)
    monkeypatch.undo()
    finetune(llama_dir, text_file, tmp_path / "cut", *flags, "--resume")
    files = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_the_remaining_commands_take_a_packed_model(packed_dir, text_file, tmp_path, capsys):
    finetune(packed_dir, text_file, tmp_path / "run", "--quiet")
    adapter = ["--adapter", str(tmp_path / "run" / "adapter"), "--max-new-tokens", "4", "--prompts", "the lamp"]
    main(["generate", *adapter])
    main(["compare", *adapter])
    assert "KL" in capsys.readouterr().out
    main(["merge", "--adapter", str(tmp_path / "run" / "adapter"), "--output", str(tmp_path / "merged")])
    _, params = jlora.load(tmp_path / "merged", dtype="float32")
    assert not any(isinstance(leaf, jlora.QuantizedTensor) for leaf in jlora.tree.paths.flatten(params).values())


@pytest.mark.slow
def test_what_quantize_refuses(packed_dir, llama_dir, tmp_path, capsys):
    for flags, words in (
        (["--model", llama_dir, "--output", packed_dir], "already holds"),
        (["--model", packed_dir, "--output", str(tmp_path / "x"), "--block-size", "128"], "quantized already"),
        (["--model", llama_dir, "--output", str(tmp_path / "x"), "--block-size", "100"], "block_size"),
    ):
        with pytest.raises(SystemExit):
            main(["quantize", *flags])
        assert words in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
