"""The house of the paper's Figure 3 as a family of tasks. Pure Python: microseconds a step."""

import random
from typing import ClassVar

from envs import UNKNOWN, Env


class House(Env):
    """Turn a thing on whose parts are out of sight.

    The thing and the parts it needs lie in closed containers of different rooms; all must be taken
    before it can be turned on. The task decides where they are, so what was learnt in one episode
    helps in the next; the variation decides the start room, which holds none of them if the house
    is large enough, and what lies in other containers. What stands before a colon is a thought:
    only what follows is done.

    rooms           1 to 12
    containers      in every room, 1 to 6, all closed at first
    parts           that the thing needs beside itself, 0 to 2: 4, 7 or 10 actions at best
    partial_credit  for opening the right containers and for taking what was in them, up to 50 in
                    all; else only the 100
    """

    VERSION = "house 2"
    DEFAULT_TASKS: ClassVar = ["radio", "fan"]
    DEFAULT_STEP_LIMIT = 12
    VARIATIONS = 128
    THINGS: ClassVar = {
        "red light bulb": ("battery", "wire"),
        "fan": ("plug", "blade"),
        "radio": ("antenna", "speaker"),
        "heater": ("hose", "valve"),
        "clock": ("spring", "dial"),
        "printer": ("paper", "ink"),
    }
    ROOMS = ("kitchen", "bedroom", "workshop", "cellar", "garage", "attic",
             "bathroom", "office", "hall", "garden", "pantry", "studio")  # fmt: skip
    CONTAINERS = ("box", "drawer", "cupboard", "chest", "basket", "suitcase")
    JUNK = ("spoon", "book", "sock", "rope", "coin", "pen", "cup", "hat")

    def __init__(
        self,
        rooms: int = 4,
        containers: int = 2,
        parts: int = 0,
        step_limit: int | None = None,
        partial_credit: bool = True,
    ):
        super().__init__(step_limit)
        ranges = [("rooms", rooms, 1, 12), ("containers", containers, 1, 6), ("parts", parts, 0, 2)]
        for name, value, least, most in ranges:
            if not least <= value <= most:
                raise ValueError(f"{name} must be {least} to {most}, not {value}")
        needed = parts + 1
        if needed > rooms * containers:
            raise ValueError(f"{needed} things need {needed} containers; raise rooms or containers")
        self.rooms = self.ROOMS[:rooms]
        self.containers = self.CONTAINERS[:containers]
        self.places = [(room, box) for room in self.rooms for box in self.containers]
        self.parts = parts
        self.partial_credit = partial_credit

    def tasks(self) -> list[str]:
        """The things that can be turned on."""
        return list(self.THINGS)

    def variation_count(self, task: str) -> int:
        """The same for every task."""
        return self.VARIATIONS

    def hide(self, task: str, variation: int) -> dict[str, tuple[str, str]]:
        """Where each thing that is needed lies: thing -> (room, container), the task's own last."""
        needed = [*self.THINGS[task][: self.parts], task]
        draw = random.Random(f"hide the {task}")  # text seeds give the same draws in every process
        places = draw.sample(self.places, len(needed))
        if len(self.rooms) > len(needed):  # a room for each, and one to start in
            while len({room for room, _ in places}) < len(needed):
                places = draw.sample(self.places, len(needed))
        return dict(zip(needed, places))

    def start(self, task: str, variation: int) -> tuple[str, str, str]:
        """Hide the things, fill the other containers, choose the start room."""
        self.hiding = self.hide(task, variation)
        draw = random.Random(f"{task} {variation}")
        taken = [room for room, _ in self.hiding.values()]
        free = [room for room in self.rooms if room not in taken]
        self.start_room = draw.choice(free or self.rooms)
        contents = [*self.JUNK, *[None] * len(self.places)]
        self.inside = dict(zip(self.places, draw.sample(contents, len(self.places))))
        for thing, place in self.hiding.items():
            self.inside[place] = thing

        self.room = self.start_room
        self.opened = set()  # places
        self.carried = []
        self.points = 0
        self.solved = False
        # Points for a right container, and again for what was in it.
        self.share = 25 // len(self.hiding) if self.partial_credit else 0

        *parts, thing = self.hiding
        text = f"Your task is to turn on the {thing}."
        if parts:
            text += f" It needs {' and '.join(parts)}."
        prompt = (
            f"You are in a house. {text} "
            "All is hidden in closed containers: take it before you turn it on. "
            f"Rooms: {', '.join(self.rooms)}. In each: {', '.join(self.containers)}. "
            "Answer THOUGHT: ACTION. Actions: go to ROOM, open CONTAINER, take THING, "
            "turn on THING, look around, inventory."
        )
        return f"You are in the {self.room}. {self._need()}", text, prompt

    def act(self, action: str) -> tuple[str, int, bool, str]:
        """Do what follows the last colon."""
        command = action.rpartition(":")[2].strip()
        verb, name = self._options().get(command, ("", ""))
        observation = self._do(verb, name)
        return observation, self.points, self.solved, command

    def anchor(self) -> str:
        """The room, what is open and what is carried: all that can change."""
        opened = sorted(f"{room} {box}" for room, box in self.opened)
        carried = sorted(self.carried)
        return f"in {self.room}, open: {', '.join(opened)}, carried: {', '.join(carried)}"

    def valid_actions(self) -> list[str]:
        """All that the house understands now."""
        return sorted(self._options())

    def gold_path(self) -> list[str]:
        """From one thing that is needed to the next."""
        path = []
        here = self.start_room
        for thing, (room, box) in self.hiding.items():
            if room != here:
                path.append(f"go to {room}")
            path += [f"open {box}", f"take {thing}"]
            here = room
        return [*path, f"turn on {self.task}"]

    def _options(self) -> dict[str, tuple[str, str]]:
        """Every action that the house understands now: its verb and what it is done to."""
        options = {"look around": ("look around", ""), "inventory": ("inventory", "")}
        for room in self.rooms:
            if room != self.room:
                options[f"go to {room}"] = ("go to", room)
        for box in self.containers:
            thing = self.inside[self.room, box]
            if (self.room, box) not in self.opened:
                options[f"open {box}"] = ("open", box)
            elif thing is not None:
                options[f"take {thing}"] = ("take", box)
        for thing in self.carried:
            options[f"turn on {thing}"] = ("turn on", thing)
        return options

    def _do(self, verb: str, name: str) -> str:
        """Change the house, the points and `solved` -> observation."""
        place = self.room, name
        if verb == "look around":
            return f"You are in the {self.room}. " + " ".join(map(self._state, self.containers))
        if verb == "inventory":
            return f"You carry: {', '.join(self.carried) or 'nothing'}."
        if verb == "go to":
            self.room = name
            return f"You are in the {name}."
        if verb == "open":
            self.opened.add(place)
            if place in self.hiding.values():
                self.points += self.share
            return f"You open the {name}: {self._content(name)}."
        if verb == "take":
            thing = self.inside[place]
            self.inside[place] = None
            self.carried.append(thing)
            if thing in self.hiding:
                self.points += self.share
            return f"You take the {thing}. {self._need()}"
        if verb == "turn on":
            self.solved = name == self.task and set(self.hiding) <= set(self.carried)
            if not self.solved:
                return f"Nothing happens. {self._need()}"
            self.points = 100
            return f"The {name} is on."
        return UNKNOWN

    def _need(self) -> str:
        missing = [thing for thing in self.hiding if thing not in self.carried]
        return f"You need: {', '.join(missing) or 'nothing more'}."

    def _state(self, box: str) -> str:
        state = self._content(box) if (self.room, box) in self.opened else "closed"
        return f"The {box}: {state}."

    def _content(self, box: str) -> str:
        """A fact in the one form that facts have here: THING in ROOM CONTAINER."""
        thing = self.inside[self.room, box]
        return f"found {thing} in {self.room} {box}" if thing else "empty"
