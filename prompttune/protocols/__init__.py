"""Published protocols: the methods, tasks, settings and seeds of a table, and the table itself."""

from prompttune.protocols.plan import RunSpec, make_plan
from prompttune.protocols.recipe import Recipe, load_recipe
from prompttune.protocols.runner import Outcome, execute
from prompttune.protocols.summary import Summary, summarise

__all__ = ["Outcome", "Recipe", "RunSpec", "Summary", "execute", "load_recipe", "make_plan", "summarise"]
