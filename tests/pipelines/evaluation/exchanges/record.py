"""Record how the benchmarks' own code asks its judge and reads the answer, by running it against a made-up endpoint.

    python record.py CHECKOUTS

CHECKOUTS holds OpenVE-3M, ImgEdit, Kiwi-Edit, OmniWeaving, CoVEBench and LoomVideo as their authors publish them. Needs
openai, google-genai, requests, tqdm and pyyaml, and nothing of this project: only what was sent and scored is kept.
The rubrics' own words are replaced by short ones, since they are not ours to keep.
"""

import base64
import hashlib
import importlib.util
import json
import os
import sys
import tempfile
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

EDIT = "\nGrade this edit on three axes, from 1 to 5, and say why. Instruction: <edit_prompt>.\nBelow are the videos:\n"
MAKE = "\nGrade this film on three axes, from 1 to 5, and say why. Text: <input_prompt>.\nThe first picture:\n"
REFVIE = EDIT.replace("<edit_prompt>", "{prompt}")
INSTRUCTION = 'make the coat "red"'
FILES = ("source.mp4", "result.mp4", "one.jpg", "two.png", "background.png", "source.jpg", "result.png")
LINES = "Brief reasoning: fine.\nA: {0}\nB: {1}\nC: {2}"
ANSWERS = {
    "lines": [
        LINES.format(4, 3, 5), LINES.format("**4**", "3/5", "4.0"),
        "Reasoning: at 12: 30 it flickers\nA: 4\nB: 2\nC: 3", "None.",
    ],
    "refvie": [
        "Brief reasoning: x\nIdentity Consistency & Compliance: 4\nTemporal Consistency & Texture Fidelity: 3\n"
        "Physical Integration & Tracking: 5",
        "**Identity Consistency & Compliance**: 4\nTemporal Consistency & Texture Fidelity: 3\n"
        "Physical Integration & Tracking: 2",
        "Identity Consistency & Compliance: 4.5\nTemporal Consistency & Texture Fidelity: 3",
        "Identity Consistency & Compliance: 7\nTemporal Consistency & Texture Fidelity: 3\n"
        "Physical Integration & Tracking: 2",
    ],
    "json": [
        '{"Instruction Following": 4, "Detail Preserving": 3, "Overall Visual Quality": 5}',
        'Here: ```json\n{"Instruction Following": 9, "Detail Preserving": "2", "Overall Visual Quality": 0}\n```',
        '{"Instruction Following": 4, "Detail Preserving": 3}',
    ],
    "mi2v": [
        '{"Prompt Following": 4, "Multi-Subject and Background Consistency": 3, "Overall Visual Quality": 4}',
        '{"Prompt Following": 4, "Multi-Subject Consistency": 3, "Overall Visual Quality": 4}',
    ],
}  # fmt: skip


class Endpoint:
    """Chat completions, ``generateContent`` and file uploads; keeps every request in one form."""

    def __init__(self):
        self.answer, self.requests, self.uploads = "", [], {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def handler(self):
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                headers = {}
                if "/upload/" in self.path or "upload_id" in self.path:
                    answer, headers = endpoint.upload(self, content)
                elif "chat/completions" in self.path:
                    endpoint.requests.append(from_openai(json.loads(content)))
                    message = {"role": "assistant", "content": endpoint.answer}
                    answer = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
                    answer["choices"] = [{"index": 0, "message": message, "finish_reason": "stop"}]
                else:
                    endpoint.requests.append(from_gemini(self.path, json.loads(content), endpoint.uploads))
                    parts = [{"text": endpoint.answer}]
                    answer = {"candidates": [{"content": {"role": "model", "parts": parts}, "finishReason": "STOP"}]}
                body = json.dumps(answer).encode()
                self.send_response(200)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments):
                return

        return Handler

    def upload(self, request, content):
        if "start" in request.headers.get("X-Goog-Upload-Command", ""):
            mime = request.headers.get("X-Goog-Upload-Header-Content-Type", "")
            name = f"files/{len(self.uploads)}"
            self.uploads[f"{self.url}/{name}"] = (mime, b"")
            return {}, {"x-goog-upload-url": f"{self.url}/upload_id/{len(self.uploads) - 1}"}
        name = f"files/{request.path.rsplit('/', 1)[1]}"
        mime = self.uploads[f"{self.url}/{name}"][0]
        self.uploads[f"{self.url}/{name}"] = (mime, content)
        file = {"name": name, "uri": f"{self.url}/{name}", "mimeType": mime, "state": "ACTIVE"}
        return {"file": file}, {"x-goog-upload-status": "final"}


def digest(content):
    return hashlib.sha256(content).hexdigest()


def from_openai(body):
    """A chat completion's request in the common form."""
    messages = body["messages"]
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    parts = []
    for part in messages[-1]["content"]:
        if part["type"] == "text":
            parts.append({"text": part["text"]})
        else:
            head, data = part[part["type"]]["url"].split(",", 1)
            parts.append({"mime": head[5:].split(";")[0], "sha256": digest(base64.b64decode(data))})
    form = {"api": "openai", "model": body["model"], "system": system, "parts": parts}
    return form | {"temperature": body.get("temperature"), "max_tokens": body.get("max_tokens")}


def from_gemini(path, body, uploads=None):
    """A ``generateContent`` request in the common form."""
    parts = []
    for message in body["contents"]:
        for part in message["parts"]:
            inline = part.get("inline_data") or part.get("inlineData")
            if "text" in part:
                parts.append({"text": part["text"]})
            elif inline:
                mime = inline.get("mime_type") or inline.get("mimeType")
                parts.append({"mime": mime, "sha256": digest(base64.b64decode(inline["data"]))})
            else:
                mime, content = uploads[part["fileData"].get("fileUri") or part["fileData"]["file_uri"]]
                parts.append({"mime": mime, "sha256": digest(content)})
    system = "".join(p["text"] for p in (body.get("systemInstruction") or {}).get("parts", []))
    settings = body.get("generationConfig") or {}
    form = {"api": "gemini", "model": path.split("/models/")[1].split(":")[0], "system": system, "parts": parts}
    return form | {"temperature": settings.get("temperature"), "max_tokens": settings.get("maxOutputTokens")}


def load(path, **constants):
    """A module of a checkout with some of its globals replaced; what it imports and does not need is made up."""
    for name in ("torch", "torchvision", "torchvision.transforms"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(f"official_{len(sys.modules)}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.pop(0)
    for name, value in constants.items():
        assert hasattr(module, name), (path, name)
        setattr(module, name, value)
    return module


def main():
    """Write what was recorded."""
    root = Path(sys.argv[1]).absolute()
    time.sleep = lambda seconds: None
    endpoint = Endpoint()
    os.environ |= {"GEMINI_API_KEY": "none", "GOOGLE_GEMINI_BASE_URL": endpoint.url, "OPENAI_API_KEY": "none"}
    folder = Path(tempfile.mkdtemp())
    for name in FILES:
        (folder / name).write_bytes(f"the bytes of {name}".encode())
    at = {name: str(folder / name) for name in FILES}
    found = {}

    def record(name, answers, ask):
        scores = []
        for answer in answers:
            endpoint.answer, endpoint.requests = answer, []
            scores.append(ask())
        found[name] = {"request": endpoint.requests[0], "answers": answers, "scores": scores}

    def headers(url):
        return {"gemini_url": url, "gemini_headers": {"Content-Type": "application/json"}}

    chat = f"{endpoint.url}/v1/chat/completions"
    m = load(root / "OpenVE-3M/OpenVE-Bench/gemini_benchmark.py", **headers(chat))
    text = EDIT.replace("<edit_prompt>", INSTRUCTION)
    record("openve/official", ANSWERS["lines"], lambda: m.extract_scores_and_average(
        m.call_gemini_model(at["source.mp4"], at["result.mp4"], text)))  # fmt: skip

    gemini = f"{endpoint.url}/v1beta/models/gemini-2.5-pro-06-17:generateContent"
    ours = root / "LoomVideo/src/evaluation"
    lv = load(ours / "openve.py", EDIT_TYPE_TO_PROMPT={"local_add": EDIT})
    record("openve/loomvideo", ANSWERS["lines"], lambda: lv._score_single_sample(
        "local_add", INSTRUCTION, at["source.mp4"], at["result.mp4"], "", gemini, {})["average"])  # fmt: skip
    lr = load(ours / "refvie.py", EDIT_TYPE_TO_PROMPT={"subject": REFVIE})
    paths = (at["source.mp4"], at["one.jpg"], at["result.mp4"])
    record("refvie/loomvideo", ANSWERS["refvie"], lambda: lr._score_single_refvie_sample(
        "subject", INSTRUCTION, *paths, "", gemini, {})["average"])  # fmt: skip
    lc = load(ours / "imgedit.py", EDIT_TYPE_TO_PROMPT={"add": EDIT})
    client = lc.OpenAI(api_key="none", base_url=f"{endpoint.url}/v1")
    record("imgedit/loomvideo", ANSWERS["lines"], lambda: lc._score_single_sample(
        "add", INSTRUCTION, at["source.jpg"], at["result.png"], "", client, "gpt-4.1")["average"])  # fmt: skip
    li = load(ours / "intelligent_vbench.py")
    for name, kind in (("prompt", "local_add"), ("prompt_with_bg", "compositional_mi2v_2subject")):
        li.TASK_TYPE_CONFIG[kind][name] = EDIT if kind == "local_add" else MAKE

    def row(kind, source, references):
        paths = json.dumps([at[name] for name in references])
        values = {"task_type": kind, "instruction": INSTRUCTION, "gen_video_path": at["result.mp4"]}
        return values | {"source_video": source, "ref_image_paths": paths}

    record("ivbench_tiv2v/loomvideo", ANSWERS["json"], lambda: li._score_single_sample(
        row("local_add", at["source.mp4"], ["one.jpg"]), "", gemini, {})["average"])  # fmt: skip
    three = ["one.jpg", "two.png", "background.png"]
    record("ivbench_mi2v/loomvideo", ANSWERS["mi2v"], lambda: li._score_single_sample(
        row("compositional_mi2v_2subject", "", three), "", gemini, {})["average"])  # fmt: skip

    ie = load(root / "ImgEdit/Benchmark/Basic/basic_bench.py")
    averages = load(root / "ImgEdit/Benchmark/Basic/step1_get_avgscore.py")
    make = ie.OpenAI
    ie.OpenAI = lambda **_: make(api_key="none", base_url=f"{endpoint.url}/v1")

    def imgedit():
        item = {"id": "source.jpg", "prompt": INSTRUCTION, "edit_type": "add"}
        (folder / "k.png").write_bytes((folder / "result.png").read_bytes())
        _, reply = ie.process_single_item("k", item, str(folder), str(folder), {"add": EDIT})
        return averages.extract_scores_and_average(reply)

    record("imgedit/official", ANSWERS["lines"], imgedit)

    kiwi = load(root / "Kiwi-Edit/eval_refvie_gemini.py")
    kiwi.model_id = "gemini-3-flash-preview"

    def refvie():
        answer = kiwi.run_gemini_eval(
            at["source.mp4"], at["result.mp4"], at["one.jpg"], REFVIE.format(prompt=INSTRUCTION), {}, 0
        )
        return answer[0] if answer else None

    record("refvie/official", ANSWERS["refvie"], refvie)

    oi = root / "OmniWeaving/intelligentVBench"
    tiv2v = load(oi / "evaluate_tiv2v.py", tiv2v_local_add=EDIT, **headers(chat))
    csv_row = {"edited_type": "local_add", "prompt": INSTRUCTION, "condition_video": "source.mp4", "index": "result"}
    csv_row["condition_image"] = "one.jpg"
    record("ivbench_tiv2v/official", ANSWERS["json"], lambda: tiv2v._process_single_row(
        0, csv_row, [], str(folder), 8192, str(folder))[1][1:3])  # fmt: skip
    mi2v = load(oi / "evaluate_compositional_mi2v.py", **headers(chat))
    mi2v.Compositional_MI2V_multi_subjects_with_background = MAKE
    many = {"prompt": INSTRUCTION, "index": "result", "subject_img_1": "one.jpg", "subject_img_2": "two.png"}
    many["background_img"] = "background.png"
    record("ivbench_mi2v/official", ANSWERS["mi2v"], lambda: mi2v._process_single_row(
        0, many, [], str(folder), 8192, str(folder))[1][1:3])  # fmt: skip

    found |= covebench(root, at)
    Path("exchanges.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _cove(number, form, dimension, question, expected, **more):
    values = {"id": number, "type": form, "dimension": dimension, "question": question, "expected_answer": expected}
    return values | more


COVE_QUESTIONS = [
    _cove("Q1", "Single-TF", "Execution Accuracy", "Is it red?", "Yes"),
    _cove("Q2", "AB-MCQ", "Execution Accuracy", "Which?", "B", options={"A": "x", "B": "y"}),
    _cove("Q3", "Single-TF", "Physical Logic", "Any noise?", "No"),
    _cove("Q4", "Dual-TF", "Physical Logic", "Is B darker?", "Yes"),
    _cove("Q5", "Score-MCQ", "Semantic Preservation", "How well kept?", "5"),
]
COVE_REPLIES = {
    "Single-TF": [
        '[{"id": "Q1", "reasoning": "r", "final_answer": "Yes"}, '
        '{"id": "Q3", "reasoning": "r", "final_answer": "Yes"}]',
        '<think>[1]</think>```json\n[{"id": "Q1", "reasoning": "r", "answer": "no"}, {"id": "Q3", "reasoning": "", '
        '"final_answer": "No"}]\n```',
        '[{"id": "Q1", "reasoning": "r", "final_answer": "Yes"}]',
    ],
    "AB-MCQ": ['[{"id": "Q2", "reasoning": "r", "final_answer": "A and B"}]'],
    "Dual-TF": ['Sure: [{"id": "Q4", "reasoning": "r", "final_answer": "yes"}]'],
    "Score-MCQ": ['[{"id": "Q5", "reasoning": "r", "final_score": 8}]'],
}


def covebench(root, at):
    """The same of CoVEBench, whose judge runs in the process: what it is given stands for the request."""
    base = root / "CoVEBench/metrics/subjective/mllm_checklist"
    cove, scoring = load(base / "eval_checklist.py"), load(base / "aggregate_subjective.py")
    found = {}
    for form, replies in COVE_REPLIES.items():
        chosen = [q for q in COVE_QUESTIONS if q["type"] == form]
        listed = [{k: q[k] for k in ("id", "question", "options") if k in q} for q in chosen]
        task = {"q_type": form, "prompt_text": f"{form}: answer these questions about videos, please, as JSON."}
        task |= {"video_a_abs": at["source.mp4"], "video_b_abs": at["result.mp4"], "llm_input_qs": listed}
        messages = cove.build_task_messages(task | {"editing_instruction": INSTRUCTION})
        parts = []
        for part in messages[1]["content"]:
            if part["type"] == "text":
                parts.append({"text": part["text"]})
            else:
                content = Path(part["video_url"]["url"].removeprefix("file://")).read_bytes()
                parts.append({"mime": "video/mp4", "sha256": digest(content)})
        request = {"api": "openai", "model": "Qwen/Qwen3.5-122B-A10B", "system": messages[0]["content"], "parts": parts}
        # The settings stand in the middle of its main function.
        request |= {"temperature": 0.0, "max_tokens": 16384}
        scores = []
        for reply in replies:
            rows = json.loads(cove.extract_json_from_text(reply, form))
            valid, _ = cove.validate_llm_output(rows, [q["id"] for q in chosen])
            given = {str(row["id"]): cove.extract_answer_from_dict(row) for row in rows} if valid else {}
            answered = [(q, q | {"model_answer": given.get(q["id"])}) for q in chosen]
            scores.append({q["id"]: scoring.score_question(told) for q, told in answered} if valid else None)
        found[f"covebench/official/{form}"] = {"request": request, "answers": replies, "scores": scores}
    return found


if __name__ == "__main__":
    main()
