"""What agents and CI use: read a run, ask for a change, wait for its effect, gate. Loads neither torch nor pandas."""

from outspoken.agent_api.run import NotARun, RequestRefused, Run

__all__ = ["NotARun", "RequestRefused", "Run"]
