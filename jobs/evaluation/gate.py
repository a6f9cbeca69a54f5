"""``loomvideo gate``: decide, record the decision, and move a registry alias when the candidate passes."""

import dataclasses
import json
from pathlib import Path

from mlflow.exceptions import MlflowException

from loomvideo.jobs.evaluation.setup import evaluation_run, tracked
from loomvideo.pipelines.evaluation import mlflow_report
from loomvideo.pipelines.evaluation.gate import PASSED, GateDecision, GateRule, decide_gate
from loomvideo.pipelines.evaluation.results import clean, load_suites
from loomvideo.platform.console import console
from loomvideo.platform.errors import UserError
from loomvideo.platform.registry import MODEL_ID, register_version


def gate_rule(metric: str, **limits: float | bool | None) -> GateRule:
    """The rule of a metric named SUITE/METRIC.

    Raises:
        UserError: if the name has no suite, or the metric cannot be a gate.
    """
    suite, separator, name = metric.partition("/")
    if not separator:
        raise UserError(f"--metric {metric}: expected SUITE/METRIC, such as openve/judge_worst")
    rule = GateRule(suite, name, **limits)
    rule.threshold()
    return rule


def run_gate(
    baseline: str, candidate: str, rule: GateRule, registered_model: str, alias: str, runs: Path, tracking_uri: str
) -> bool:
    """Decide, log the decision, and move the alias when the candidate passes.

    The run is tagged ``passed`` only when everything that was asked for has happened.

    Raises:
        UserError: if a run is missing, or the registry refuses the version.
    """
    folder = evaluation_run(runs, candidate)
    a, b = load_suites(evaluation_run(runs, baseline).path), load_suites(folder.path)
    decision = decide_gate(rule, a, b)
    client, run_id = tracked(folder, tracking_uri)
    name = f"{rule.suite}/{rule.metric}"
    file = folder.write_text(
        f"gate-{Path(baseline).name}-{rule.suite}-{rule.metric.replace('/', '-')}.json",
        json.dumps(clean(_record(rule, decision)), indent=1),
    )
    client.log_artifact(run_id, str(file), "gate")
    mlflow_report.log_metrics(client, run_id, _figures(name, decision))
    why = "".join(f"\n- {reason}" for reason in decision.reasons)
    mlflow_report.prepend_note(
        client, run_id, f"**Gate on {name} against {baseline}**: {decision.verdict}. {decision.line(name)}{why}"
    )
    out = console()
    out.print(decision.line(name), highlight=False, soft_wrap=True)
    for reason in decision.reasons:
        out.print(f"gate: {reason}", style="red", highlight=False, soft_wrap=True)
    if decision.verdict != PASSED:
        client.set_tag(run_id, "gate", f"{decision.verdict}: {'; '.join(decision.reasons)}"[:4000])
        return False
    if registered_model:
        run = client.get_run(run_id)
        model_id = run.data.tags.get(MODEL_ID, "")
        if not model_id:
            client.set_tag(run_id, "gate", f"failed: the run has no model to register as {registered_model}")
            raise UserError(f"{candidate}: its MLflow run names no model to register; evaluate a checkpoint again")
        tags = {"gate": f"{name} against {baseline}", "loomvideo.evaluation": f"{folder.job}/{folder.name}"}
        try:
            version = register_version(client, registered_model, alias, model_id, run_id, tags)
        except MlflowException as error:
            client.set_tag(run_id, "gate", f"failed: the registry refused {registered_model}: {error}"[:4000])
            raise UserError(f"registry: {registered_model}: {error}") from error
        out.print(f"registry: {registered_model}@{alias} is now version {version}", highlight=False)
    client.set_tag(run_id, "gate", PASSED)
    out.print(f"gate: {candidate} holds against {baseline} on {name}", style="green", highlight=False)
    return True


def _record(rule: GateRule, decision: GateDecision) -> dict:
    return {"rule": dataclasses.asdict(rule), "decision": dataclasses.asdict(decision)}


def _figures(name: str, decision: GateDecision) -> dict[str, float]:
    values = {"gain": decision.gain, "bound": decision.bound, "threshold": decision.threshold, "power": decision.power}
    return {f"gate/{name}/{key}": value for key, value in values.items() if value == value}
