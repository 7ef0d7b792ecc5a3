"""Says in sentences what a report's records mean; the text and the HTML page share them."""

from __future__ import annotations

from grapefx.report.records import MethodReport, PlanReport, ReportData

# whose equations the report quotes
PAPER = "GrAPE 2026"


def notes(r: ReportData) -> list[str]:
    """What the numbers mean and assume; shared by text and HTML."""
    return [
        "work: all FLOPs of a step; a multiply-add is 2. span: the longest dependency path through "
        "single ops. by layer: the same when a layer's forward, or its whole update, is one task "
        "(BP's backward then counts weight and input gradient on the path, as frameworks run it). "
        "chain: how many layers' updates wait for one another; 1 when all can run at once.",
        "The loss runs in your code, outside these graphs: it orders the step but costs nothing "
        "here; neither does the optimizer.",
        f"arithmetic: the ratio (1 + beta) / (1 + alpha) of {PAPER}, appendix D, with alpha and "
        "beta measured on these graphs. It leaves the method's weight gradients out and keeps BP's "
        "in; the ratios beside it count everything.",
        "bytes op by op: every operand and result of every op. bytes fused: what is left when "
        "pointwise ops are computed inside their consumers of the same layer and phase; times "
        "assume this.",
        "times: roofline model with pointwise fusion, list scheduling by upward rank, workers "
        f"that share memory at no cost; one worker is {r.device.worker}. A prediction, "
        "not a measurement.",
    ]


def plan_facts(method: MethodReport, tap: str = "output error") -> list[tuple[str, str]]:
    """What the compiler decided for a method, as pairs of a subject and a sentence.

    ``tap`` is what the place is called where the output error is read.
    """
    p = method.plan
    if p is None:
        return []
    facts = [*p.runs, (tap, error_tap(p))]
    if method.method != "bp":
        if exact := exact_part(p):
            facts.append(("exact", exact))
        facts.append(("updates", proof(p)))
        if p.exact_rows is not None:
            facts.append(("exact rows", chain(p.exact_rows, p.exact_late)))
        if any(kind == "align" for kind, _ in p.runs):
            facts.append(("tangents", derived(p)))
    return facts


def epochs(every: float) -> str:
    """How often, behind the word "every"."""
    return "epoch" if every == 1 else f"{every:g} epochs"


def proof(p: PlanReport) -> str:
    """What the graph shows about who waits for whom, in a sentence."""
    if p.sequential:
        return "sequential: a layer's update waits for the layer above, by the method's definition"
    if p.proved is None:
        return "not examined: no graph without a full backward was built"
    exact = f"; {_gradients(p.exact)} (the head) no feedback reaches" if p.exact else ""
    return (
        f"proved on the graph: {_gradients(p.proved)} depend on the feedback of their own layer "
        f"alone{exact}"
    )


def chain(exact_rows: tuple[int, int], late: bool) -> str:
    """What waits for a backward chain because of ``exact_rows``, in a sentence."""
    n, batch = exact_rows
    if late:
        return (
            f"one step late: no update waits for the backward chain on {n} of {batch} samples, "
            "whose correction of the gradients is added in the next step (work and times on P "
            "workers count the chain, span does not)"
        )
    return (
        f"each update waits for a backward chain on {n} of {batch} samples, which reads no layer's "
        "feedback"
    )


def derived(p: PlanReport) -> str:
    """Operators whose tangent torch derives, in a sentence."""
    if not p.derived:
        return "every operator on the tangents' way has a rule of grapefx"
    return "derived by torch's forward AD: " + ", ".join(p.derived)


def exact_part(p: PlanReport) -> str:
    """Where the part begins whose gradients are true, in words; empty where there is none."""
    shown = [*p.exact_from[:3], *(["..."] if len(p.exact_from) > 3 else [])]
    return f"true gradients from {', '.join(shown)} on" if shown else ""


def error_tap(p: PlanReport) -> str:
    """Where the output error is read and how the batch size stands in the graph."""
    batch = "any batch size" if p.symbolic_batch else "this batch size only"
    return f"gradient at {p.tap or 'the output'}; the graphs hold for {batch}"


def _gradients(n: int) -> str:
    return "1 parameter gradient" if n == 1 else f"{n} parameter gradients"
