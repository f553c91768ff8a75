"""`erniequant chat`: talk to a model, at a terminal or through a pipe."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from erniequant.errors import ErnieQuantError
from erniequant_cli.conversation import Screen, make_screen
from erniequant_cli.errors import FAILED, complain, one_line
from erniequant_cli.options import Device, Dtype, JsonFile, Quiet, deliver
from erniequant_cli.terminal import typed

if TYPE_CHECKING:
    from erniequant.generation import ChatSession

COMMANDS = {
    "/image": "show a file with the next message; without a file, take images back",
    "/reset": "forget the chat; the system prompt stays",
    "/help": "list these commands",
    "/exit": "leave, as Ctrl-D does",
}


def chat(
    model: Annotated[str, typer.Argument(help="Folder of a quantised or a plain checkpoint.")],
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What the model is told before the chat.")
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="An image for the first message; repeat for more."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 1024,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.0, help="0 always takes the likeliest token. Default: the model's own."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Take one of the likeliest tokens that together have this probability. "
            "Default: the model's own.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    device: Device = "auto",
    dtype: Dtype = None,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Chat with a model, in the form of its own chat template.

    Ctrl-C stops an answer. At an empty prompt it leaves, as Ctrl-D does. /help lists commands.
    From a pipe, every line is a message, and stdout gets only the answers.
    When the context is full, the oldest messages are dropped.

    [bold]Examples[/bold]

      erniequant chat ernie-2bit

      erniequant chat ernie-vl-2bit --image photo.jpg

      erniequant chat ernie-2bit --system "Answer in one sentence." < questions.txt
    """
    from erniequant.generation import ChatSession, Sampling
    from erniequant_cli.loading import load_model

    sampling = Sampling(temperature, top_p, seed)
    subject, tokenizer = load_model(model, device, dtype)
    session = ChatSession(
        subject,
        tokenizer,
        system=None if system is None else typed(system),
        sampling=sampling,
        max_new_tokens=max_new_tokens,
    )
    conversation = _Conversation(session, make_screen(quiet), max_new_tokens)
    for file in image or ():
        conversation.attach(file)
    conversation.run(model)
    result = {"model": model, "system": system, "exchanges": conversation.exchanges}
    deliver(result, json, quiet, lambda: None)
    if conversation.failed:
        raise typer.Exit(FAILED)


class _Conversation:
    """Lines to messages and commands, answers to a screen."""

    def __init__(self, session: "ChatSession", screen: Screen, max_new_tokens: int) -> None:
        self._session, self._screen, self._max_new_tokens = session, screen, max_new_tokens
        self._images: list[str] = []
        self.exchanges: list[dict[str, Any]] = []
        self.failed = False
        """True if a message from a pipe has no answer."""

    def attach(self, file: Path) -> None:
        """Raises ErnieQuantError if the model cannot be shown the image."""
        self._session.attach(file)
        self._images.append(str(file))

    def run(self, model: str) -> None:
        """Talk until the input ends."""
        with self._screen.open(model):
            while (line := self._screen.next_line()) is not None:
                if line.strip() == "/exit":
                    return
                self._take(line.strip())

    def _take(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        try:
            if name.startswith("/") and name[1:].isalpha():
                self._command(name, rest.strip())
            elif line:
                self._answer(line[1:] if line.startswith("//") else line)
        except ErnieQuantError as error:
            complain(one_line(error))
            self.failed = not self._screen.is_conversation

    def _command(self, name: str, rest: str) -> None:
        if name == "/reset":
            self._session.reset()
            self._images.clear()
            self._screen.note("the chat begins anew")
        elif name == "/image" and rest:
            file = rest[1:-1] if rest[0] in "\"'" and rest[-1] == rest[0] else rest
            self.attach(Path(file))
            self._screen.note(f"{file} goes with the next message")
        elif name == "/image":
            self._session.detach()
            self._images.clear()
            self._screen.note("no image goes with the next message")
        elif name == "/help":
            self._screen.note("\n".join(f"{key:8} {text}" for key, text in COMMANDS.items()))
        else:
            raise ErnieQuantError(
                f"there is no command {name}; /help lists them, and /{name} says {name}"
            )

    def _answer(self, message: str) -> None:
        pieces: list[str] = []
        answer = None
        with self._screen.answering() as show:

            def take(piece: str) -> None:
                show(piece)
                pieces.append(piece)

            try:
                answer = self._session.say(message, take)
            except KeyboardInterrupt:
                if not self._screen.is_conversation:
                    raise
        exchange = {"message": message, "images": self._images}
        if answer is None:
            self.exchanges.append({**exchange, "text": "".join(pieces), "finish": "interrupted"})
            self._screen.note("stopped")
            # Without a word of an answer, nothing was said, and images go with the next message.
            self._images = [] if pieces else self._images
            return
        self.exchanges.append({**exchange, **answer.to_dict()})
        self._images = []
        if answer.dropped:
            self._screen.note(
                f"the context is full; the oldest {2 * answer.dropped} messages were dropped"
            )
        if answer.finish == "length":
            limit = answer.tokens >= self._max_new_tokens
            reason = "at --max-new-tokens" if limit else "because the context is full"
            self._screen.note(f"cut off after {answer.tokens} tokens, {reason}")
        self._screen.measured(answer)
