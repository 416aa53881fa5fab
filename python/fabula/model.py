"""`Model`, the main class of the SDK: weights, tokenizer and chat template of one checkpoint."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from fabula._native import inputs_of_bf16, kv_layers
from fabula.choices import (
    DEFAULT_MODEL,
    MAX_THREADS,
    SPECULATION_NAMES,
    WEIGHTS_NAMES,
    WINDOW_KV,
    Bf16Inputs,
    SpeculationName,
    WeightsName,
    WindowKv,
)
from fabula.engine.defaults import SamplingDefaults, read_defaults
from fabula.engine.device import Placement
from fabula.engine.generation import Engine, Generation
from fabula.engine.runner import Runner
from fabula.engine.sampling import SamplingParams
from fabula.engine.scheduler import Scheduler
from fabula.engine.threads import default_threads
from fabula.errors import InvalidArgument, TemplateError, TokenizerError, Unsupported
from fabula.formats.checkpoint import Checkpoint
from fabula.formats.download import Progress
from fabula.formats.fingerprint import Fingerprinting
from fabula.formats.locate import locate
from fabula.kv.cache import KvEvictionList
from fabula.kv.format import kv_dtypes
from fabula.kv.pages import PoolUsage
from fabula.lean_dataclasses import replace
from fabula.models.description import ModelConfig
from fabula.models.opening import check_context, open_model
from fabula.models.precision import identity_of, label_of, precision_of
from fabula.sessions.model_handle import LoadedModel, ModelHandle
from fabula.text.prefill import is_prefilled
from fabula.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from fabula.engine.embedding import Embedder, Embeddings, Pooling
    from fabula.kv.spill import Fingerprint
    from fabula.sessions.policy import ContextPolicy
    from fabula.sessions.session import Session
    from fabula.text.template import ChatTemplate

KvName = str  # one of `choices.KV_NAMES`


class Model:
    """A loaded model.

    Example:
        >>> with Model.load() as model:
        ...     for piece in model.generate("Once upon a time", SamplingParams(max_tokens=20)):
        ...         print(piece.text, end="")

    Attributes:
        path: folder or file it was read from.
        config: sizes; see `ModelConfig`.
        tokenizer: `encode` and `decode`.
        weights: precision of most matrices, e.g. "f16" or "q8_0".
        kv: precision of the KV cache.
        window_kv: whether KV that no window shows any more is kept while there is room, or dropped.
        bf16_inputs: inputs of products with bf16 weights, "bf16" or "f32"; None without such weights and on a GPU.
        threads: threads per step.
        context: context length in tokens.
        device: "cpu", "cuda:0", ..., or several GPUs as "cuda:0+1".
        device_name: name of the GPU; "" for the CPU.
        defaults: the model's recommended sampling settings, used where `SamplingParams` leaves one unset.
        speculation: "auto" or "off"; see `load`.
    """

    def __init__(
        self,
        path: Path,
        runner: Runner,
        tokenizer: Tokenizer,
        weights: str,
        kv: str,
        threads: int,
        scheduler: Scheduler | None = None,
        digest: str = "",
        defaults: SamplingDefaults | None = None,
        *,
        speculation: SpeculationName = "auto",
    ) -> None:
        self.path = path
        self.window_kv: WindowKv = "drop" if runner.pool.drops else "keep"
        self.bf16_inputs: Literal["bf16", "f32"] | None = runner.bf16_inputs
        self.defaults = defaults or SamplingDefaults()
        self.tokenizer = tokenizer
        self.weights, self.kv, self.threads = weights, kv, threads
        self._runner = runner
        self.speculation = speculation
        self._drafter: Model | None = None
        self._engine = Engine(
            runner,
            tokenizer,
            KvEvictionList(runner.pool),
            scheduler or Scheduler(),
            self.defaults.values,
            speculation,
        )
        self._embedders: Embedder | None = None  # created on first use
        self._embedder_lock = threading.Lock()
        self._template = TemplateOf(tokenizer, path)
        c = runner.config
        layers = f"{c.n_layers} layers x {c.n_kv_heads} heads x {c.head_dim}"
        if c.kv_layers != kv_layers(c.n_layers, c.n_kv_heads, c.head_dim):
            layers = ", ".join("x".join(map(str, layer)) for layer in c.kv_layers)
        layout = f"2: {layers}, rope for {runner.context}"
        if c.state_layers:
            layout += ", states of " + "+".join(map(str, c.state_layers))
        if runner.bf16_inputs is not None:
            layout += f", bf16 weights x {runner.bf16_inputs} inputs"
        if runner.device is not None:  # results differ from those of other devices: a sequence must not mix them
            layout += f", computed with CUDA {runner.device.info.compute}"
            if len(runner.device.members) > 1:  # so do those of another number of GPUs
                layout += f" on {len(runner.device.members)} GPUs"
            layout += " and cuBLASLt" if runner.products == "library" else ""
        self._fingerprint = FingerprintOf(tokenizer, digest, kv, layout)
        self._handle = ModelHandle(
            path.name, LoadedModel(self._engine, self._template, self._fingerprint, "", self.defaults)
        )

    @classmethod
    def load(
        cls,
        name_or_path: str | os.PathLike[str] = DEFAULT_MODEL,
        *,
        weights: WeightsName = "auto",
        kv: KvName = "f16",
        threads: int | None = None,
        pin_threads: bool = False,
        context: int | None = None,
        kv_memory: int | None = None,
        state_memory: int | None = None,
        window_kv: WindowKv = "keep",
        device: str = "cpu",
        device_memory: int | None = None,
        tensor_parallel: int = 1,
        device_products: str = "own",
        fetch: bool = True,
        fetch_progress: Progress | None = None,
        load_progress: Callable[[int, int], None] | None = None,
        scheduler: Scheduler | None = None,
        speculation: SpeculationName = "auto",
        draft_model: str | os.PathLike[str] | None = None,
        ignore_memory: bool = False,
        bf16_inputs: Bf16Inputs = "auto",
    ) -> Model:
        """Finds a model, downloads it if needed, and loads it.

        Args:
            name_or_path: a Hugging Face folder, a .gguf file, or a name; see `fabula pull --help`.
            weights: precision of the matrices in memory. "auto" keeps each matrix as in the checkpoint; the others
                quantize at load, as `fabula quantize` does ("q8", "q4", ... are short for q8_0, q4_k_m, ...).
            kv: format of the KV cache: "f16", "f32", "bf16" or "q8", or two of them for K and V, as "q8:f16".
            threads: None for as many as this process may use (affinity, CPU quota, physical cores, without the slow
                ones of hybrid CPUs).
            pin_threads: whether each thread is bound to a CPU of its own, on Linux. It helps on machines of several
                sockets that run nothing else, where weights are then in the memory next to their thread, and harms
                beside other processes.
            context: context length in tokens; None for the model's own, which is also the limit.
            kv_memory: bytes of the KV cache; None for four sequences of the full context. On the CPU only used pages
                take memory; on a GPU the cache is allocated, up to the free memory.
            state_memory: bytes of the recurrent states of a hybrid model, one for each place that a text can go on from
                without being computed again; None for 1 GiB. Only used slots take memory. The least recently used are
                evicted, to disk where there is a place; the counts of reused and recomputed tokens show what that
                costs. Of no effect for other models.
            window_kv: for models with windowed layers, on the CPU: when their KV left of the window is dropped. "keep":
                when memory runs out, before anything else is evicted; "drop": as soon as the text has grown beyond
                it, and `kv_memory` None means less. A rollback, fork or new answer where it was dropped recomputes it,
                with the same results; the counts of reused and recomputed tokens show it.
            device: "cpu"; "cuda", the first GPU, or "cuda:N"; "auto", a GPU with enough memory, else the CPU.
            device_memory: limit of each GPU's memory in bytes, including the KV cache; None for what is free.
            tensor_parallel: number of GPUs, from `device` on, that share every layer.
            device_products: "own", or "library": cuBLASLt for products of 128 tokens or more on a GPU. It may be faster
                for long prompts, but the results of a token then depend on the other tokens of the batch.
            fetch: whether a missing model may be downloaded.
            fetch_progress: callback for a download's progress.
            load_progress: callback (bytes read, total bytes) while weights are packed.
            scheduler: shared with other models; None for a new one.
            speculation: "auto" guesses several tokens and verifies them in one step where that is faster: what was
                written before, in the prompt, the answer, or other turns of the session, and what a constraint forces.
                Tokens, log-probabilities and seeds stay the same, bit for bit. "off" never does. On a GPU it is off.
            draft_model: a smaller model with the same vocabulary that guesses where nothing was written before; as
                `name_or_path`. It runs on the CPU and has its own KV cache, of the same context length.
            ignore_memory: loads weights that do not fit the available memory, too: the system may then swap, or end
                the process.
            bf16_inputs: inputs of products with bf16 weights: rounded to "bf16", or "f32". The results differ, but each
                kind has the same bits on every CPU. "auto" is the faster one: "bf16" on CPUs with AVX-512 BF16, else
                "f32". Name one to replay elsewhere what was generated here; `Model.bf16_inputs` says which it was.

        Raises:
            ModelNotFound: no model has that name.
            DownloadError: the download failed.
            ModelFileError: a file is damaged; names file and tensor or key.
            Unsupported: an unsupported family, tensor type or tokenizer; or this build has no CUDA, NCCL is missing for
                several GPUs, or cuBLASLt cannot be loaded; or window_kv is "drop", or bf16_inputs is set, on a GPU.
            InvalidArgument: an option is out of range.
            OutOfMemory: the weights do not fit the available memory (of the system, or of a cgroup), or the system
                refused memory.
            DeviceOutOfMemory: the GPU has not enough memory.
            DeviceError: no driver, no GPU, or it failed.
        """
        if weights not in WEIGHTS_NAMES:
            raise InvalidArgument(f"weights is {weights!r}, must be one of {', '.join(WEIGHTS_NAMES)}")
        if speculation not in SPECULATION_NAMES:
            raise InvalidArgument(f"speculation is {speculation!r}, must be one of {', '.join(SPECULATION_NAMES)}")
        if draft_model is not None and speculation == "off":
            raise InvalidArgument("a draft model is given, but speculation is off")
        kv_formats = kv_dtypes(kv)
        limits = (
            ("threads", threads, MAX_THREADS),
            ("context", context, 1 << 24),
            ("kv_memory", kv_memory, 1 << 50),
            ("state_memory", state_memory, 1 << 50),
            ("device_memory", device_memory, 1 << 50),
        )
        for name, value, most in limits:
            if value is not None and (type(value) is not int or not 1 <= value <= most):
                raise InvalidArgument(f"{name} is {value!r}, must be a whole number in 1 .. {most}")
        inputs_of_bf16(bf16_inputs)
        if window_kv not in WINDOW_KV:
            raise InvalidArgument(f"window_kv is {window_kv!r}, must be one of {', '.join(WINDOW_KV)}")
        placement = Placement(device, device_memory, tensor_parallel, device_products)
        n_threads = threads or default_threads()
        path = locate(name_or_path, fetch=fetch, progress=fetch_progress)
        opened, config = open_model(path)
        checkpoint = Fingerprinting(opened)
        try:
            check_context(checkpoint, config, context)
            tokenizers: list[Tokenizer] = []

            def read_tokenizer() -> None:
                tokenizers.append(load_tokenizer(checkpoint))
                check_vocabulary(tokenizers[0], config, checkpoint.path)

            defaults = read_defaults(checkpoint)
            label = label_of(weights, checkpoint)
            runner = Runner(
                checkpoint,
                weights=precision_of(weights, config),
                kv=kv_formats,
                n_threads=n_threads,
                context=context,
                kv_memory=kv_memory,
                state_memory=state_memory,
                drops_windowed=window_kv == "drop",
                bf16_inputs=bf16_inputs,
                progress=load_progress,
                placement=placement,
                meanwhile=read_tokenizer,
                pins=pin_threads,
                ignore_memory=ignore_memory,
            )
        finally:
            checkpoint.close()
        tokenizer = tokenizers[0]
        digest = f"{checkpoint.digest}-{identity_of(weights, checkpoint)}"
        model = cls(path, runner, tokenizer, label, kv, n_threads, scheduler, digest, defaults, speculation=speculation)
        if draft_model is not None:
            try:
                model._drafts_with(
                    cls.load(
                        draft_model,
                        threads=n_threads,
                        fetch=fetch,
                        fetch_progress=fetch_progress,
                        ignore_memory=ignore_memory,
                    )
                )
            except BaseException:
                model.close()
                raise
        return model

    def _drafts_with(self, drafter: Model) -> None:
        """Lets another model draft for this one, which closes it.

        Raises:
            InvalidArgument: it has another vocabulary.
            Unsupported: it has no head, or this model runs on a GPU.
        """
        self._drafter = drafter
        if self._runner.device is not None:
            raise Unsupported("a model on a GPU does not use a draft model: speculation is off there")
        drafter._runner.check_head()
        from fabula.engine.draft_model import DraftModel

        source = DraftModel(drafter._runner, drafter.tokenizer, drafter._engine.cache)
        source.check_vocabulary(self.tokenizer)
        self._engine = replace(self._engine, draft_model=source)
        self._handle.attach(LoadedModel(self._engine, self._template, self._fingerprint, "", self.defaults))

    # ---- Properties ------------------------------------------------------------------------------------------------

    @property
    def config(self) -> ModelConfig:
        return self._runner.config

    @property
    def context(self) -> int:
        return self._runner.context

    @property
    def device(self) -> str:
        return "cpu" if self._runner.device is None else self._runner.device.name

    @property
    def device_name(self) -> str:
        return "" if self._runner.device is None else self._runner.device.info.name

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed matrices."""
        return self._runner.weight_bytes

    @property
    def fingerprint(self) -> Fingerprint:
        """Identifies everything besides the tokens that the KV cache depends on; equal for models that may share it."""
        return self._fingerprint()

    @property
    def template(self) -> ChatTemplate:
        """The model's chat template.

        Raises:
            TemplateError: the model has none, or it cannot be compiled.
        """
        return self._template()

    # ---- Generation ------------------------------------------------------------------------------------------------

    def logits(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits of the next token after each token of a text.

        Args:
            token_ids: ids in 0 .. vocab_size-1, at least one, at most `context`.

        Returns:
            float32 [n_tokens, vocab_size]; row i is for the token after token i.

        Raises:
            InvalidArgument: empty, or an id outside the vocabulary.
            ContextOverflow: more tokens than the context length.
            Unsupported: the model has no head.
        """
        self._runner.check_head()
        return np.concatenate(list(self._runner.all_logits(self._runner.token_ids(token_ids))))

    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        parse_special: bool = True,
        special: bool | None = None,
    ) -> Generation:
        """Continues a text.

        Args:
            prompt: text or token ids. The start token is added to a text if the tokenizer does so and the text does not
                begin with it; ids are used as they are.
            params: sampling settings; unset ones are the model's defaults.
            parse_special: whether to parse control tokens in the text, as needed by callers that apply a template
                themselves; False treats them as text.
            special: former name of `parse_special`.

        Returns:
            An iterator of `Piece`. Generation starts immediately and runs a few pieces ahead of the reader.

        Raises:
            InvalidArgument: an empty prompt or an id outside the vocabulary.
            ContextOverflow: the prompt is longer than the context; carries both numbers.
            EngineBusy: the queue of requests is full.
        """
        parses = parse_special if special is None else special
        ids = self.tokenizer.encode(prompt, special=parses) if isinstance(prompt, str) else prompt
        return Generation(self._engine, ids, params or SamplingParams(), continues=True)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        continue_final_message: bool | None = None,
        parse_special: bool = False,
        **template_options: Any,
    ) -> Generation:
        """Generates the next reply of a conversation, rendered with the model's chat template.

        Args:
            messages: each with "role" (system, user, assistant, tool) and "content". If the last is the assistant's,
                the model continues it, and the reply holds only the new text.
            params: sampling settings; unset ones are the model's defaults.
            continue_final_message: False starts a new turn after a final reply; True raises an error if there is none
                to continue.
            parse_special: whether to parse control tokens in the messages. By default they are text, so that user input
                cannot fake other turns.
            template_options: variables of the template, e.g. `tools`. `chat_template` chooses one of several templates
                by name; the default with tools is "tool_use".

        Raises:
            TemplateError: the model has no template, or the template refuses the messages; names its line.
            InvalidArgument: a message without role or content.
            ContextOverflow: the conversation is longer than the context.
        """
        continues = is_prefilled(messages, continue_final_message, template_options.get("add_generation_prompt"))
        ids = self.chat_ids(
            messages,
            continue_final_message=continue_final_message,
            parse_special=parse_special,
            **template_options,
        )
        return Generation(self._engine, ids, params or SamplingParams(), continues=continues)

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        continue_final_message: bool | None = None,
        parse_special: bool = False,
        **template_options: Any,
    ) -> list[int]:
        """Token ids of the prompt for the next reply of a conversation; arguments and errors as `chat`."""
        if parse_special:
            from fabula.text.chat import with_control_tokens  # imported here, because jinja2 is slow to import

            messages = with_control_tokens(messages)
        return self.tokenizer.encode_chat(
            self.template, messages, continue_final_message=continue_final_message, **template_options
        )

    def embed(
        self,
        texts: Sequence[str | Sequence[int]],
        *,
        pooling: Pooling = "mean",
        normalize: bool = True,
        parse_special: bool = True,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Embeddings:
        """Embeds each text: a vector of its hidden states after the last norm, pooled.

        Texts are encoded with all tokens of the post-processor, including an end token: embedding models such as
        Qwen3-Embedding use the hidden state of that "last" token.

        Any model gives vectors; those of a model that was not trained for it distinguish texts only roughly. The vector
        of a text does not depend on the others.

        Args:
            texts: at least one, none of them empty; each as text, or as token ids, which are used as they are.
            pooling: "mean" of all tokens, which suits generative models (Muennighoff, 2022, weights by position
                instead), "last" token, or "first".
            normalize: whether to scale vectors to length 1, so that their dot product is the cosine similarity.
            parse_special: whether to parse control tokens in the texts, as transformers and llama.cpp do; False treats
                them as text.
            should_stop: callback between steps; True ends with EngineError.

        Raises:
            InvalidArgument: no text, an empty one, or an unknown pooling.
            ContextOverflow: a text is longer than the context; names it and carries both numbers.
            OutOfMemory: no free KV pages.
        """
        from fabula.engine.embedding import checked_texts

        ids = [
            self.tokenizer.encode(text, special=parse_special, add_eos=None) if isinstance(text, str) else text
            for text in checked_texts(texts)
        ]
        return self._embedder().embed(ids, pooling=pooling, normalize=normalize, should_stop=should_stop)

    def _embedder(self) -> Embedder:
        with self._embedder_lock:
            if self._embedders is None:
                from fabula.engine.embedding import Embedder

                self._embedders = Embedder(self._runner)
            return self._embedders

    def session(
        self,
        id: str | None = None,
        *,
        system: str | None = None,
        sampling: SamplingParams | None = None,
        context_policy: ContextPolicy | str | None = None,
        tenant: str = "",
    ) -> Session:
        """A new session in memory: a conversation or story as a tree of turns. `Workspace.session` makes durable ones.

        Args:
            id: its name, 1 .. 128 of A-Z a-z 0-9 . _ -; None makes a random one.
            system: system message of a chat.
            sampling: default settings of turns.
            context_policy: what happens when the context is full: "error", "slide", "drop_oldest_turns", or a
                `ContextPolicy`.
            tenant: its owner; the KV cache of equal prefixes is shared only between sessions of one owner.

        Raises:
            InvalidArgument: a setting is out of range.
        """
        from fabula.sessions.session import Session

        return Session(self._handle, id=id, tenant=tenant, system=system, params=sampling, policy=context_policy)

    def import_(
        self, data: Mapping[str, Any], *, id: str | None = None, kv: str | os.PathLike[str] | None = None
    ) -> Session:
        """Imports the data of `Session.export` as a session in memory; arguments and errors as `Workspace.import_`."""
        from fabula.sessions.archive import import_session

        return import_session(data, self._handle, id=id, kv=kv)

    # ---- Memory -----------------------------------------------------------------------------------------------------

    @property
    def kv_usage(self) -> PoolUsage:
        """Pages of the KV cache: used, shared, cached, on disk; and slots of recurrent states."""
        return self._engine.cache.usage()

    def clear_cache(self) -> None:
        """Evicts everything from the KV cache that no running request uses; sessions recompute it when needed."""
        self._engine.cache.clear()

    # ---- Closing ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Frees weights and KV cache. Idempotent. Running generations end with an error."""
        self._handle.detach()
        self._engine.scheduler.drop(self._runner)
        self._engine.cache.close()
        self._runner.close()
        if self._drafter is not None:
            self._drafter.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        c = self.config
        return (
            f"<fabula.Model {self.path.name}: {c.model_type}, {c.n_layers} layers, hidden {c.hidden_size}, "
            f"vocabulary {c.vocab_size}, weights {self.weights}, kv {self.kv}, context {self.context}, "
            f"device {self.device}>"
        )


class TemplateOf:
    """Compiles a model's chat template on first use; raises as `Model.template`."""

    def __init__(self, tokenizer: Tokenizer, path: Path) -> None:
        self._tokenizer, self._path = tokenizer, path
        self._template: ChatTemplate | None = None

    def __call__(self) -> ChatTemplate:
        if self._template is None:
            source = self._tokenizer.chat_template
            if source is None:
                raise TemplateError(
                    f"{self._path}: the model has no chat template; use generate(), or a model made for chat",
                    path=self._path,
                )
            self._template = self._tokenizer.make_template()
        return self._template


class FingerprintOf:
    """Computes a model's fingerprint on first use: hashing the tokenizer takes longer than a decode step.

    Args:
        tokenizer: of the model; released after hashing.
        weights: hash of the weights.
        kv: format of the KV cache.
        layout: description of the KV pages.
    """

    def __init__(self, tokenizer: Tokenizer, weights: str, kv: str, layout: str) -> None:
        self._tokenizer: Tokenizer | None = tokenizer
        self._weights, self._kv, self._layout = weights, kv, layout
        self._lock = threading.Lock()
        self._fingerprint: Fingerprint | None = None

    def __call__(self) -> Fingerprint:
        from fabula.kv.spill import Fingerprint

        with self._lock:
            if self._fingerprint is None:
                assert self._tokenizer is not None
                self._fingerprint = Fingerprint(
                    weights=self._weights, tokenizer=self._tokenizer.fingerprint, kv=self._kv, layout=self._layout
                )
                self._tokenizer = None
            return self._fingerprint


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig, path: Path) -> None:
    """Raises TokenizerError if the tokenizer has ids without an embedding."""
    if tokenizer.vocab_size > config.vocab_size:
        raise TokenizerError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} ids, the model only {config.vocab_size}",
            path=path,
            field="vocab_size",
        )


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer of a checkpoint."""
    if checkpoint.format == "gguf":
        return Tokenizer.from_gguf(checkpoint.metadata, checkpoint.path)
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    return Tokenizer.from_folder(folder)
