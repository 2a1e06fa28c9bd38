"""The sentences of a report on a comparison, for its page, its Markdown and its CSV."""

import math

from launch.report.estimates import FEWEST, Estimate, PairedTest
from launch.report.record import Record
from launch.report.section import AXES, Section

AT = {"steps": "equal steps", "flops": "equal FLOPs", "seconds": "equal time"}
MIDWAY = "\u2020"
PRECISION = "\u2021"
HOW = (
    "\u00b1 is half the 95 % interval of Student's t over seeds, n their number (of those that were"
    " planned). Every method stands with one setting (learning rate, radius), the one with the"
    " lowest mean loss among the settings that it tried: at equal steps the final loss, at equal"
    " FLOPs and time the loss at that budget, where another setting than at equal steps is named."
    " Chosen on the same seeds that are reported, the figure of a method is lucky, the more so the"
    " more settings it tried: select_seeds=0,1 chooses on some seeds and reports on the others, and"
    " so do runs with the tags role=tune and role=report. The budget of equal FLOPs and of equal"
    " time is the largest that all runs compared here reached; a run that ends within 5 % of it"
    " counts with its final loss, any other is read on the straight line between its two"
    " evaluations around the budget. Time is spent in steps, without evaluations."
)
TESTING = (
    f"Differences are paired by seed. Below {FEWEST} pairs each difference stands for itself; else"
    " a two-sided paired t-test, with p adjusted by Holm over the methods of a column. Time is the"
    " machine's as much as the method's and is not tested."
)
UNANNEALED = (
    f"{MIDWAY} read in the middle of the learning-rate schedule: the rate is not annealed there"
    " yet, which costs these runs loss that a run of this length would not pay."
    " optim.compute_matched=true trains a method to AdamW's FLOPs on a schedule of its own."
)
# A difference is called possible chance from this p value on.
LEVEL = 0.05


def headline(section: Section) -> list[str]:
    """Returns what won, and whatever is to be said against it."""
    return [*winners(section), *caveats(section)]


def winners(section: Section) -> list[str]:
    """Returns what won at equal steps, FLOPs and time, a sentence each."""
    # Less than two methods with a finished run leave nothing to win.
    if len(section.runs) == 1:
        return [lone_run(section.runs[0])]
    if not section.best:
        return ["No run is finished yet."]
    if len(section.best) == 1:
        ((method, setting),) = section.best.items()
        found = section.at_equal("steps", method)
        return [
            f"{setting}: final validation loss {loss_text(found)} over"
            f" {of_planned(section, found)}, {how_chosen(section, method)}. There is no other"
            " method to compare."
        ]
    return [winner_at(section, axis) for axis in AXES]


def lone_run(run: Record) -> str:
    """Returns how a run that stands alone has fared."""
    # AdamW has no radius; a number that a run does not have is not named.
    method, *numbers = setting_texts(run)
    named = zip(("lr", "rho", "seed"), numbers, strict=True)
    name = ", ".join(f"{key} {text}" for key, text in named if text)
    if run.state == "finished":
        ended = f"final validation loss {run.loss:.4f}"
    else:
        ended = f"{run.state} at step {run.step:,}; {run.reason}".rstrip("; ")
    return f"{method} ({name}): {ended}. There is no other method to compare."


def winner_at(section: Section, axis: str) -> str:
    """Returns what won at the budget of an axis, in a sentence."""
    at = f"At {AT[axis]} ({budget_text(section, axis)}): "
    # The doubt goes into details behind its colon, which stand among the caveats.
    if axis == "seconds" and section.doubt:
        return f"{at}no evidence, for {section.doubt.partition(':')[0]}."
    ranked = section.ranked(axis)
    if not ranked:
        return f"{at}no run was there."
    first, *others = ranked
    found = section.at_equal(axis, first)
    sentence = (
        f"{at}{section.chosen[axis][first]}{precision_mark(section, first)} has the"
        f" lowest validation loss, {loss_text(found)} over "
        f"{of_planned(section, found)}, {how_chosen(section, first)}"
    )
    # The winner is compared with the baseline; where the baseline wins, the second is.
    compared = first
    if first == section.baseline:
        compared = next(iter(others), "")
    if compared:
        sentence += beside_baseline(section, axis, compared, is_winner=compared == first)
    return f"{sentence}."


def beside_baseline(section: Section, axis: str, method: str, is_winner: bool) -> str:
    """Returns the end of a sentence on the winner: how `method` differs from the baseline by seed.

    The sentence has said the setting of the winner; that of the other of the two is said here.
    Nothing is returned where the two were not compared."""
    # The difference is always the method's minus the baseline's, whichever of the two has won.
    test = section.tests[axis].get(method)
    if section.baseline is None or test is None:
        return ""
    ours = f"{method}{precision_mark(section, method)}"
    theirs = section.baseline
    if is_winner:
        theirs += setting_in_brackets(section, axis, section.baseline)
    else:
        ours += setting_in_brackets(section, axis, method)
    return f"; {ours} minus {theirs} by seed: {difference_text(test, axis)}"


def setting_in_brackets(section: Section, axis: str, method: str) -> str:
    """Returns the setting of a method at the budget, and how it was chosen, in brackets."""
    return f" ({section.chosen[axis][method].numbers}; {how_chosen(section, method)})"


def how_chosen(section: Section, method: str) -> str:
    """Returns of how many settings that of a method is the best, and on which runs; variants of a
    method differ in other keys."""
    # Who tries more, of settings or of variants, wins more often by chance: so both are counted.
    tried = len(section.tried(method))
    found = "its only setting"
    if tried > 1:
        found = f"best of {tried} settings, chosen {section.selectors[method]}"
    name = method.split()[0]
    variants = [other for other in section.best if other.split()[0] == name]
    if len(variants) > 1:
        found += f", one of {len(variants)} variants of {name}"
        if method == section.baseline:
            found += ", the best on the reported seeds"
    return found


def of_planned(section: Section, found: Estimate) -> str:
    """Returns the number of seeds, and of those that were planned where these are more."""
    # The most seeds of any setting: one with fewer lacks some.
    planned = max(section.planned, found.seeds)
    if found.seeds == planned:
        return plural(found.seeds, "seed")
    return f"{found.seeds} of {planned} seeds"


def caveats(section: Section) -> list[str]:
    """Returns what is to be said against the figures."""
    # Marks that stand in the tables are explained first; the section's notes follow.
    found = []
    estimates = [
        section.at_equal(axis, method) for axis in section.chosen for method in section.best
    ]
    if any(each.midway for each in estimates):
        found.append(UNANNEALED)
    if section.imprecise:
        found.append(
            f"{PRECISION} the compute precision distorts the method's gradient; see the notes."
        )
    if section.best and not section.baseline and len(section.runs) > 1:
        found.append("No run of AdamW is finished here, so there is no paired test.")
    unfinished = [run for run in section.runs if run.state != "finished"]
    if section.best and unfinished:
        found.append(f"{len(unfinished)} of {plural(len(section.runs), 'run')} did not finish.")
    return found + section.notes


def conditions(section: Section) -> str:
    """Returns what all runs of a section share, in a line."""
    keys = section.keys
    sequences = keys["batch.sequences"]
    length = keys["batch.length"]
    shape = (
        f"{plural(keys['model.num_layers'], 'layer')} x {keys['model.width']}, tokenizer"
        f" {keys['tokenizer.name']}"
    )
    step = f"{sequences} sequences x {length} = {sequences * length:,} tokens a step"
    return f"{shape}, {step}, {keys['schedule.shape']} schedule; {plural(len(section.runs), 'run')}"


def budget_text(section: Section, axis: str) -> str:
    """Returns the budget of an axis, as a person reads it."""
    budget = section.budgets[axis]
    if axis == "steps":
        return f"{budget:,.0f} steps"
    if axis == "flops":
        return f"{budget:.3g} FLOPs"
    if budget < 10:
        return f"{budget:.2g} s"
    return f"{budget:,.0f} s"


def difference_text(test: PairedTest, axis: str) -> str:
    """Returns a comparison by seed as text, for tables and sentences alike."""
    mark = midway_mark(test.difference)
    pairs = test.difference.seeds
    # A mean of two differences has an interval of t(0.975, 1) = 12.7 standard errors, which says
    # less than the two themselves.
    if not pairs:
        return "no pair of seeds"
    if pairs < FEWEST:
        each = ", ".join(
            f"{signed_text(difference)}{mark} (seed {seed})"
            for seed, difference in test.by_seed.items()
        )
        return f"{each}; too few pairs for a test"
    details = f"{pairs} pairs"
    if axis != "seconds":
        details += f", {significance_text(test)}"
    # A no-break space in place of each but those after , and ; lets a narrow cell break between the
    # figures, not inside one.
    details = details.replace(" ", "\u00a0").replace(",\u00a0", ", ").replace(";\u00a0", "; ")
    return (
        f"{signed_text(test.difference.mean)} \u00b1 {test.difference.margin:.4f}{mark} ({details})"
    )


def significance_text(test: PairedTest) -> str:
    """Returns t and p of a test, and whether the difference may be chance."""
    if math.isnan(test.p):
        return "no spread, so no test"
    figures = f"t {test.t:.2f}, p {test.p:.2g}, by Holm {test.holm:.2g}"
    if test.holm < LEVEL:
        return figures
    return f"{figures}; may be chance"


def midway_mark(found: Estimate) -> str:
    """Returns the mark of runs that were read in the middle of their schedule."""
    return MIDWAY if found.midway else ""


def precision_mark(section: Section, method: str) -> str:
    """Returns the mark of a method whose gradient the compute precision distorts."""
    return PRECISION if method in section.imprecise else ""


def setting_texts(run: Record) -> list[str]:
    """Returns method, learning rate, radius and seed of a run, each empty where the run does not
    tell it."""
    names = ("optim.name", "optim.lr", "optim.rho", "seed")
    return [setting_text(run.settings.get(name)) for name in names]


def setting_text(value: str | float | None) -> str:
    """Returns a value of `setting_texts` as text, "" for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def loss_text(found: Estimate) -> str:
    """Returns a mean with half its 95 % interval, where it has one, and the mark of runs in the
    middle of their schedule."""
    text = f"{found.mean:.4f}"
    # One seed has no interval.
    if not math.isnan(found.margin):
        text += f" \u00b1 {found.margin:.4f}"
    return text + midway_mark(found)


def number_text(value: float, form: str = ".4f") -> str:
    """Returns a number, or nothing where it is unknown."""
    return "" if math.isnan(value) else f"{value:{form}}"


def signed_text(value: float) -> str:
    """Returns a difference with its sign, or nothing where it is unknown."""
    return number_text(value, "+.4f")


def plural(number: int, thing: str) -> str:
    """Returns a number of things, such as "1 run" or "2 runs"."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
