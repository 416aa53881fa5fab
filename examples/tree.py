"""A saved conversation as a tree: python examples/tree.py [--data FOLDER] [--model NAME]

Run it twice: the second run continues the saved conversation.
"""

import argparse

from fabula import EngineError, SamplingParams, Session, Workspace


def draw(session: Session) -> None:
    """Prints the tree, one line per turn."""
    stack = [(session.tree, 0)]
    while stack:
        node, depth = stack.pop()
        turn = node.turn
        words = f"{turn.prompt!r} -> {turn.text[:40]!r}" if turn.number else "start"
        mark = "  <- here" if turn is session.head else ""
        print("  " * depth + words + mark)
        stack += [(child, depth + 1) for child in reversed(node.children)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the sessions; default: the user's")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    arguments = parser.parse_args()

    with Workspace(arguments.data) as workspace:
        workspace.load(arguments.model)
        sampling = SamplingParams(temperature=0.7, max_tokens=40, seed=1)
        session = workspace.session("example", model=arguments.model, sampling=sampling)

        session.say("Name a city by a river.").text()
        session.say("And what can I eat there?").text()
        session.rollback(session.head.number - 1)  # nothing is computed or deleted
        for reply in session.branch(2, "And what can I see there?"):  # both in one batch
            reply.text()
        session.rollback(session.turns[-1])  # continue with the second branch
        session.tag(session.head, "seen")

        draw(session)
        print(f"{session.head.reused} tokens reused, {session.head.recomputed} computed again")


try:
    main()
except EngineError as error:
    raise SystemExit(f"error: {error}") from None
