"""A small live world for reinforcement-learning jobs: a network of a few hosts, whose goal is to act as a domain admin.

Run it with ``python examples/world/world.py --seed 7 --port 9000``; with WORLD_TOKEN in the environment it wants that
as a bearer token. Everything follows from the seed, and nothing is kept between requests: who acts, and what they know,
comes with every command, so any number of episodes can be played at once.

What it speaks is told in docs/how-to/train-in-live-worlds.md.
"""

from __future__ import annotations

import argparse
import hmac
import os
import random
import shlex
from collections.abc import Callable

import attrs
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

DOMAIN = "corp.local"
GOAL_GROUP = "Domain Admins"
GUEST = "guest"
_HOST_ROLES = ("dc", "files", "web", "mail", "backup")
_PEOPLE = ("avery", "blake", "casey", "devon", "emery", "finley", "harper", "jordan")


@attrs.frozen(kw_only=True)
class Network:
    """What there is to find."""

    hosts: dict[str, str]
    """Names and addresses."""
    files: dict[tuple[str, str], str]
    """Texts by host and file."""
    passwords: dict[str, str]
    can_reset: dict[str, str]
    """By user, whose password they may reset."""
    admins: frozenset[str]

    @classmethod
    def of_seed(cls, seed: int) -> Network:
        """Equal seeds give equal networks."""
        draw = random.Random(seed)
        hosts = {
            f"{role}{draw.randint(1, 9):02}": f"10.0.{draw.randint(0, 9)}.{index + 10}"
            for index, role in enumerate(_HOST_ROLES)
        }
        helper, clerk, admin = draw.sample(_PEOPLE, 3)
        passwords = {user: f"{draw.choice(_PEOPLE)}-{draw.randint(1000, 9999)}" for user in (helper, clerk, admin)}
        names = list(hosts)
        files = {(name, "readme.txt"): "Nothing to see here." for name in names}
        files[draw.choice(names[1:]), "notes.txt"] = f"the password of {helper} is {passwords[helper]}"
        return cls(
            hosts=hosts,
            files=files,
            passwords=passwords,
            can_reset={helper: clerk, clerk: admin},
            admins=frozenset({admin}),
        )


@attrs.frozen(kw_only=True)
class Outcome:
    """What a command came to."""

    stdout: str = ""
    stderr: str = ""
    exit_code: int = 0
    changes: dict[str, str] = attrs.field(factory=dict)
    """What the actor's context becomes."""


class World:
    """The commands of a network."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.commands: dict[str, tuple[Callable[..., Outcome], tuple[str, ...], str]] = {
            "scan": (self._scan, (), "list the hosts of the network"),
            "shares": (self._shares, ("HOST",), "list the files that a host shares"),
            "read": (self._read, ("HOST", "FILE"), "read a shared file"),
            "login": (self._login, ("USER", "PASSWORD"), "act as another user"),
            "whoami": (self._whoami, (), "show who you are and what you may do"),
            "reset": (self._reset, ("USER",), "give a user a new password, if you may"),
        }

    def run(self, line: str, principal: str) -> Outcome:
        """Do a command as somebody."""
        try:
            name, *arguments = shlex.split(line)
        except ValueError:
            return Outcome(stderr="expected a command", exit_code=2)
        if name not in self.commands:
            return Outcome(stderr=f"{name}: command not found", exit_code=127)
        act, parameters, _ = self.commands[name]
        if len(arguments) != len(parameters):
            return Outcome(stderr=f"usage: {' '.join((name, *parameters))}", exit_code=2)
        return act(principal, *arguments)

    def _scan(self, _: str) -> Outcome:
        return Outcome(stdout="\n".join(f"{ip}  {host}.{DOMAIN}" for host, ip in self.network.hosts.items()))

    def _shares(self, _: str, host: str) -> Outcome:
        found = [name for where, name in self.network.files if where == host.removesuffix(f".{DOMAIN}")]
        return Outcome(stdout="\n".join(found)) if found else Outcome(stderr="no such host", exit_code=1)

    def _read(self, _: str, host: str, name: str) -> Outcome:
        text = self.network.files.get((host.removesuffix(f".{DOMAIN}"), name))
        return Outcome(stderr="no such file", exit_code=1) if text is None else Outcome(stdout=text)

    def _login(self, _: str, user: str, password: str) -> Outcome:
        if password not in (self.network.passwords.get(user), self._reset_password(user)):
            return Outcome(stderr="access denied", exit_code=1)
        changes = {"principal_id": user, "domain": DOMAIN, "acquired_cred": f"{user}:{password}"}
        return Outcome(stdout=f"you are {user} now", changes=changes)

    def _whoami(self, principal: str) -> Outcome:
        lines = [f"{principal}@{DOMAIN}"]
        if principal in self.network.admins:
            lines.append(f"member of {GOAL_GROUP}")
        if principal in self.network.can_reset:
            lines.append(f"ForceChangePassword on {self.network.can_reset[principal]}")
        return Outcome(stdout="\n".join(lines))

    def _reset(self, principal: str, user: str) -> Outcome:
        if self.network.can_reset.get(principal) != user:
            return Outcome(stderr="access denied", exit_code=1)
        return Outcome(stdout=f"the password of {user} is {self._reset_password(user)} now")

    def _reset_password(self, user: str) -> str | None:
        password = self.network.passwords.get(user)
        return None if password is None else f"{password}-new"


def make_app(seed: int = 0, token: str | None = None) -> Starlette:
    """The world as a web application."""
    world = World(Network.of_seed(seed))

    def refusal(request: Request) -> JSONResponse | None:
        given = request.headers.get("authorization", "")
        if token is None or hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            return None
        return JSONResponse({"detail": "a bearer token is needed"}, status_code=401)

    async def commands(request: Request) -> JSONResponse:
        listed = [
            {"name": name, "usage": " ".join((name, *parameters)), "description": description}
            for name, (_, parameters, description) in world.commands.items()
        ]
        description = f"You are a {GUEST} in the network {DOMAIN}."
        return refusal(request) or JSONResponse({"commands": listed, "description": description, "reports_goal": True})

    async def run(request: Request) -> JSONResponse:
        if refused := refusal(request):
            return refused
        body = await request.json()
        if not isinstance(body, dict) or not isinstance(body.get("command"), str):
            return JSONResponse({"detail": "command is needed, as text"}, status_code=422)
        principal = body.get("principal_id") or GUEST
        outcome = world.run(body["command"], principal)
        return JSONResponse(
            {
                "stdout": outcome.stdout,
                "stderr": outcome.stderr,
                "exit_code": outcome.exit_code,
                "context_updates": outcome.changes,
                "goal_reached": outcome.changes.get("principal_id", principal) in world.network.admins,
            }
        )

    return Starlette(routes=[Route("/commands", commands), Route("/run", run, methods=["POST"])])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="serve the reference world")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    uvicorn.run(make_app(arguments.seed, os.environ.get("WORLD_TOKEN")), host=arguments.host, port=arguments.port)
