"""Which stop string ended an answer."""

from __future__ import annotations

from fabula.engine.generation import Generation


def stop_string_of(generation: Generation) -> str | None:
    """The stop string that ended an answer; None if none did."""
    stops = generation.params.stop
    if generation.finish_reason != "stop" or not stops:
        return None
    ids, text = generation.read_so_far()
    tokenizer = generation.engine.tokenizer
    known = [i for i in ids if i < tokenizer.vocab_size]
    for skip_special in (True, False):  # a stop string may name control tokens, which have no text otherwise
        decoder = tokenizer.stream_decoder(skip_special=skip_special, continues=True)
        whole = "".join([decoder.push(i) for i in known]) + decoder.flush()
        # The matcher takes the string that is complete first, of two the longer one.
        start = max(0, len(text) - 1)  # the first text may have lost a space
        found = [(at + len(stop), at, stop) for stop in stops if (at := whole.find(stop, start)) >= 0]
        if found:
            return min(found)[2]
    return None
