"""Published protocols: the methods, tasks, settings and seeds of a table, and the table itself."""

from prompttune.benchmark.plan import RunSpec, make_plan
from prompttune.benchmark.recipe import Recipe, load_recipe
from prompttune.benchmark.runner import Outcome, execute
from prompttune.benchmark.summary import Summary, summarise

__all__ = ["Outcome", "Recipe", "RunSpec", "Summary", "execute", "load_recipe", "make_plan", "summarise"]
