import dataclasses
from pathlib import Path

import fsspec
import torch
from fixtures.checkpoints import write_checkpoint
from safetensors.torch import load_file
from typer.testing import CliRunner

from loomvideo.jobs.cli import app
from loomvideo.model.config import LoRAConfig
from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.lora import MergedWeights, adapt
from loomvideo.model.sizes import model_size, stated_note
from loomvideo.model.weights import load_dit

runner = CliRunner()


def invoke(*arguments):
    return runner.invoke(app, ["checkpoint", *map(str, arguments)])


def test_ls_verify_and_diff(tmp_path):
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5)}
    write_checkpoint(tmp_path, 1, weights)
    damaged = write_checkpoint(tmp_path, 2, weights | {"b": torch.tensor([1.0, 1, 1, 1, 2])})
    listed = invoke("ls", tmp_path).output
    assert "raw, ema" in listed
    assert invoke("verify", tmp_path).exit_code == 0
    compared = invoke("diff", f"{tmp_path}@1", f"{tmp_path}@2").output
    assert "1 of 2 parameters are equal bit by bit" in compared
    assert "step: 1 | 2" in compared
    file = Path(damaged.url) / "rank-00000-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 255
    file.write_bytes(content)
    result = invoke("verify", tmp_path)
    assert "step-00000001  whole" in result.output
    assert "step-00000002  damaged" in result.output
    assert "1 of 2 checkpoints are damaged" in str(result.exception)


def test_places_that_are_none_say_so(tmp_path):
    assert "holds no checkpoints" in str(invoke("ls", tmp_path).exception)
    write_checkpoint(tmp_path, 3, {"a": torch.ones(2)})
    assert "no checkpoint of step 4; there are 3" in str(invoke("verify", f"{tmp_path}@4").exception)


def test_export_writes_a_weights_folder(tmp_path):
    model = LoomVideoDiT(model_size("tiny").dit)
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    write_checkpoint(tmp_path, 7, state, world_size=3)
    (tmp_path / "config.yaml").write_text("model: tiny\n")
    (tmp_path / "encoders.json").write_text('{"codec": "lapped-1", "mllm": "random-2"}')
    output = tmp_path / "weights"
    result = invoke("export", tmp_path, output, "--weights", "raw")
    assert result.exit_code == 0, result.exception
    assert stated_note(output)["encoders"] == {"codec": "lapped-1", "mllm": "random-2"}
    assert "raw weights of step 7" in result.output
    loaded = load_dit(output)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, state[name])
    assert "already holds weights" in str(invoke("export", tmp_path, output).exception)


def test_export_merges_adapters_or_writes_them_alone(tmp_path):
    model, lora = LoomVideoDiT(model_size("tiny").dit), LoRAConfig(rank=2, dora=True)
    adapt(model, lora)
    state = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    write_checkpoint(tmp_path, 7, state)
    settings = "\n".join(f"  {key}: {value}" for key, value in dataclasses.asdict(lora).items() if value)
    (tmp_path / "config.yaml").write_text(f"model: tiny\nlora:\n{settings}\n")
    assert invoke("export", tmp_path, tmp_path / "weights", "--weights", "raw").exit_code == 0
    merged = MergedWeights(state, lora)
    for name, parameter in load_dit(tmp_path / "weights").named_parameters():
        torch.testing.assert_close(parameter, merged[name])
    assert invoke("export", tmp_path, tmp_path / "adapter", "--weights", "raw", "--adapter").exit_code == 0
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert torch.equal(tensors["base_model.model.blocks.0.ffn.net.2.lora_A.weight"], state["blocks.0.ffn.net.2.lora_A"])


def test_every_command_takes_the_url_of_a_run(tmp_path):
    """What `checkpoint.url` names needs no run folder here."""
    url = f"memory://{tmp_path.name}/pretrain/far"
    model = LoomVideoDiT(model_size("tiny").dit)
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for step in (3, 7):
        write_checkpoint(url, step, state)
    fsspec.filesystem("memory").pipe_file(f"/{tmp_path.name}/pretrain/far/config.yaml", b"model: tiny\n")
    assert "master" in invoke("ls", url).output or "raw" in invoke("ls", url).output
    assert "step-00000007  whole" in invoke("verify", url).output
    assert "step-00000003  whole" in invoke("verify", f"{url}@3").output
    result = invoke("export", f"{url}@3", tmp_path / "weights", "--weights", "raw")
    assert result.exit_code == 0, result.exception
    for name, parameter in load_dit(tmp_path / "weights").named_parameters():
        assert torch.equal(parameter, state[name])
    assert "holds no checkpoints" in str(invoke("ls", f"{url}r").exception)
