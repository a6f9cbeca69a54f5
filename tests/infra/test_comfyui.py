"""The node folder for ComfyUI, run as its executor runs nodes: graphs are checked against what nodes state."""

import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.guidance import Guidance
from loomvideo.model.loading import ModelSource
from loomvideo.model.pipeline import load_pipeline
from loomvideo.model.sizes import PIPELINE_FILE, model_size
from loomvideo.model.weights import save_dit

FOLDER = Path(__file__).parents[2] / "infra" / "comfyui"
SIZE = model_size("tiny")
SIDE = 32  # the least that the nodes offer
TYPES = {"STRING": str, "INT": int, "FLOAT": (int, float)}


@pytest.fixture(scope="module")
def nodes():
    """The folder's mappings, imported as ComfyUI imports a folder of ``custom_nodes``."""
    spec = importlib.util.spec_from_file_location(
        "custom_nodes_loomvideo", FOLDER / "loomvideo" / "__init__.py", submodule_search_locations=[]
    )
    module = importlib.util.module_from_spec(spec)
    module.__path__ = [str(FOLDER / "loomvideo")]
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    assert set(module.NODE_DISPLAY_NAME_MAPPINGS) == set(module.NODE_CLASS_MAPPINGS)
    yield {**module.NODE_CLASS_MAPPINGS, "LoadImage": LoadImage, "SaveImage": SaveImage}
    del sys.modules[spec.name]


class LoadImage:
    """As ComfyUI's own: a picture as float [1, height, width, 3]."""

    RETURN_TYPES, FUNCTION = ("IMAGE", "MASK"), "load"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802 - the protocol's name
        return {"required": {"image": ("STRING", {})}}

    def load(self, image):
        return torch.from_numpy(np.load(image).astype(np.float32) / 255)[None], None


class SaveImage:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "save", True

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802 - the protocol's name
        return {"required": {"images": ("IMAGE",), "filename_prefix": ("STRING", {"default": ""})}}

    def save(self, images, filename_prefix):
        return {"ui": {"images": images}}


def check_input(name, value, stated):
    """What ComfyUI checks of a value that is typed in, not wired."""
    kind, options = stated[0], stated[1] if len(stated) > 1 else {}
    if isinstance(kind, list):
        assert value in kind, f"{name}: {value} is none of {kind}"
        return
    assert isinstance(value, TYPES[kind]), f"{name}: {value!r} is no {kind}"
    assert options.get("min", value) <= value <= options.get("max", value) if kind != "STRING" else True, name


def execute(graph, nodes):
    """Every node once, its inputs first; values of the nodes by id."""
    done = {}

    def run(node_id):
        if node_id in done:
            return done[node_id]
        node = nodes[graph[node_id]["class_type"]]
        stated = node.INPUT_TYPES()
        known = {**stated["required"], **stated.get("optional", {})}
        given = graph[node_id]["inputs"]
        assert not set(stated["required"]) - set(given), f"{node.__name__} lacks {set(stated['required']) - set(given)}"
        values = {}
        for name, value in given.items():
            if isinstance(value, list):
                producer, slot = value
                made = nodes[graph[producer]["class_type"]].RETURN_TYPES[slot]
                assert made == known[name][0], f"{node.__name__}.{name}: {made} wired to {known[name][0]}"
                values[name] = run(producer)[slot]
            else:
                check_input(name, value, known[name])
                values[name] = value
        result = getattr(node(), node.FUNCTION)(**values)
        if not getattr(node, "OUTPUT_NODE", False):
            assert len(result) == len(node.RETURN_TYPES)
        done[node_id] = result
        return result

    with torch.inference_mode():
        for node_id in graph:
            run(node_id)
    return done


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comfyui")
    torch.manual_seed(0)
    dit = LoomVideoDiT(SIZE.dit)
    torch.nn.init.normal_(dit.proj_out.weight, std=0.02)
    save_dit(dit, SIZE.dit, folder / "weights")
    (folder / "weights" / PIPELINE_FILE).write_text(json.dumps({"model": "tiny"}))
    picture = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    np.save(folder / "photo.npy", picture)
    return folder


def edit_graph(weights, **changes):
    """The published workflow, made small."""
    graph = json.loads((FOLDER / "workflow-edit.json").read_text())
    graph["1"]["inputs"] |= {
        "folder": str(weights / "weights"),
        "memory": "resident",
        "mllm_bits": 16,
        "kernels": "eager",
    }
    graph["2"]["inputs"]["image"] = str(weights / "photo.npy")
    graph["3"]["inputs"] |= {"steps": 1, "bucket": 0, **changes}
    return graph


def as_uint8(frames):
    return (frames * 255).round().to(torch.uint8).numpy()


def test_the_workflow_edits_as_the_package_does(nodes, weights):
    made = execute(edit_graph(weights, seed=4), nodes)["4"]["ui"]["images"]
    ours = load_pipeline(ModelSource(str(weights / "weights"), kernels=""))
    photo = np.load(weights / "photo.npy")
    stated = Guidance(2.5, 1.5)  # as the workflow says, for the published sizes
    expected = ours("make the dress blue", "image_edit", source=photo, steps=1, seed=4, guidance=stated)
    assert np.array_equal(as_uint8(made), expected)


def test_adapters_hold_on_their_own_wire(nodes, weights):
    """One loader, an adapter on one of two wires: the other stays as it was."""
    layer = "blocks.0.ffn.net.2"
    rank, (out, inner) = 2, dict(LoomVideoDiT(SIZE.dit).named_parameters())[f"{layer}.weight"].shape
    save_file(
        {
            f"diffusion_model.{layer.replace('ffn.net.2', 'ffn.2')}.lora_A.weight": torch.randn(rank, inner),
            f"diffusion_model.{layer.replace('ffn.net.2', 'ffn.2')}.lora_B.weight": torch.randn(out, rank),
        },
        weights / "style.safetensors",
    )
    graph = {"1": edit_graph(weights)["1"]}
    lora = {"model": ["1", 0], "lora": str(weights / "style.safetensors"), "strength": 1.0}
    graph["2"] = {"class_type": "LoomVideoLora", "inputs": lora}
    generate = {"prompt": "a coat", "negative_prompt": "", "task": "auto", "width": SIDE, "height": SIDE,
                "num_frames": 1, "seed": 0, "steps": 1, "scale": 2.0, "visual_scale": 1.5}  # fmt: skip
    for number, model in (("3", "1"), ("4", "2"), ("5", "1")):
        graph[number] = {"class_type": "LoomVideoGenerate", "inputs": {"model": [model, 0], **generate}}
    done = execute(graph, nodes)
    plain, adapted, again = (done[number][0] for number in "345")
    assert torch.equal(plain, again)
    assert not torch.equal(plain, adapted)


def test_progress_and_interruption_are_comfyuis(nodes, weights, monkeypatch):
    """Inside ComfyUI the bar moves with the steps, a stop ends the node, and adapters are chosen from its folder."""

    class Stopped(Exception):  # noqa: N818 - no error
        pass

    steps = []

    def check():
        if len(steps) == 2:
            raise Stopped

    management = types.SimpleNamespace(throw_exception_if_processing_interrupted=check)
    utils = types.SimpleNamespace(ProgressBar=lambda total: types.SimpleNamespace(update=steps.append))
    paths = types.SimpleNamespace(get_filename_list=lambda kind: ["a.safetensors"], get_full_path=lambda *_: "/x/a")
    for name, module in (("comfy", types.ModuleType("comfy")), ("comfy.model_management", management),
                         ("comfy.utils", utils), ("folder_paths", paths)):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(Stopped):
        execute(edit_graph(weights, steps=4), nodes)
    assert len(steps) == 2
    assert nodes["LoomVideoLora"].INPUT_TYPES()["required"]["lora"][0] == ["a.safetensors"]
    assert nodes["LoomVideoLora"]().add(_model(nodes), "a.safetensors", 0.5)[0].adapters == (("/x/a", 0.5),)


def _model(nodes):
    return sys.modules[nodes["LoomVideoLora"].__module__].Model(pipeline=None)
