"""Published protocols: the methods, tasks, settings and seeds of a table, and the table itself."""

from prompttune.benchmark.plan import RunSpec, make_plan
from prompttune.benchmark.recipe import Recipe, load_recipe
from prompttune.benchmark.runner import RunResult, execute
from prompttune.benchmark.summary import ResultsTable, summarise

__all__ = ["Recipe", "ResultsTable", "RunResult", "RunSpec", "execute", "load_recipe", "make_plan", "summarise"]
