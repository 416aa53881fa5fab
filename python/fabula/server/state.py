"""State of a running server: workspace, models, runs and limits. `server()` returns it in a request."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast
from weakref import WeakSet

from quart import current_app

from fabula.engine.sampling import SamplingParams
from fabula.errors import EngineError, InvalidArgument, SessionNotFound
from fabula.kv.pages import PoolUsage
from fabula.model import Model
from fabula.server.failures import ApiError, not_found, stopped
from fabula.server.feed import Feed
from fabula.server.gate import Gate
from fabula.server.limits import Limits, check_free
from fabula.server.metrics import Metrics
from fabula.server.observer import Observer, notify
from fabula.server.runs import Run, Runs
from fabula.server.schemas import Sampling
from fabula.server.settings import Settings
from fabula.sessions.session import Session
from fabula.workspace import Workspace

T = TypeVar("T")

N_THREADS = 32  # for blocking work: tokenizing, waiting for a commit
MAX_USAGE_WAIT_S = 0.05
MAX_ADDED = 8  # models that clients may add to those of the settings
N_SESSIONS = 256  # most recently used ones keep their trees in memory


def _ignore_error(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()  # a model that is being closed: the last numbers stay


@dataclass(slots=True)
class Serving:
    """A model the server offers, and its state.

    Attributes:
        name: its name in requests.
        place: where it is loaded from.
        state: progress of loading.
        done, total: bytes downloaded or read.
        error: why loading failed.
        model: set when ready.
        usage: KV cache pages at the last update; None before the model is loaded.
        is_stopping: whether to stop loading.
    """

    name: str
    place: str
    state: Literal["waiting", "fetching", "loading", "ready", "failed"] = "waiting"
    done: int = 0
    total: int | None = None
    error: str = ""
    model: Model | None = None
    is_stopping: bool = False
    usage: PoolUsage | None = None
    _refreshing: asyncio.Task[None] | None = None

    async def refresh_usage(self) -> None:
        """Updates `usage` in a worker thread. Waits for it MAX_USAGE_WAIT_S at most, and never for a lock: while one is
        held for longer, `usage` stays as it was."""
        if self.model is None:
            return
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(asyncio.to_thread(self.read_usage))
            self._refreshing.add_done_callback(_ignore_error)
        await asyncio.wait([self._refreshing], timeout=MAX_USAGE_WAIT_S)

    def read_usage(self) -> None:
        """Updates `usage`; blocks."""
        if self.model is not None:
            self.usage = self.model.kv_usage

    def _check_stopping(self) -> None:
        if self.is_stopping:
            raise EngineError("the server was stopped")

    def update(self, done_bytes: int, total_bytes: int | None) -> None:
        """Progress of the download, in bytes; satisfies `fabula.formats.download.Progress`."""
        self.state, self.done, self.total = "fetching", done_bytes, total_bytes
        self._check_stopping()

    def loaded(self, done: int, total: int) -> None:
        """Progress of loading the weights, in bytes."""
        self.state, self.done, self.total = "loading", done, total
        self._check_stopping()

    def to_json(self) -> dict[str, Any]:
        """JSON for /health."""
        found: dict[str, Any] = {"name": self.name, "state": self.state}
        if self.state in ("fetching", "loading"):
            found["progress"] = round(self.done / self.total, 3) if self.total else None
        if self.error:
            found["error"] = self.error
        if self.state == "ready" and self.model is not None and (usage := self.usage) is not None:
            found |= {
                "weights": self.model.weights,
                "device": self.model.device,
                "weight_bytes": self.model.weight_bytes,
                "context": self.model.context,
                "sampling_defaults": self.model.defaults.to_json(),
                "window_kv": self.model.window_kv,
                "bf16_inputs": self.model.bf16_inputs,
                "cache_bytes": usage.used_bytes,
                "cache_limit_bytes": usage.n_pages * usage.page_bytes,
                "state_bytes": usage.state_bytes,
                "state_limit_bytes": usage.n_slots * usage.slot_bytes,
            }
        return found


class Server:
    """A server's state.

    Args:
        workspace: holds the sessions; its owner closes it.
        settings: of the server.

    Attributes:
        models: by name.
        runs: answers being generated.
        limits: per key.
        gate: checks every request.
        metrics: counters for Prometheus.
        feed: sends changes of sessions to pages.
        observers: notified of events.
        begun_at: start of the server, Unix time in seconds.
    """

    def __init__(self, workspace: Workspace, settings: Settings) -> None:
        self.workspace, self.settings = workspace, settings
        self.models = {name: Serving(name, place) for name, place in settings.models}
        self.runs = Runs(settings.replay_s)
        self.limits = Limits(settings, workspace)
        self.metrics = Metrics(self)
        self.feed = Feed()
        self.observers: list[Observer] = []
        self.begun_at = time.time()
        self._threads = ThreadPoolExecutor(N_THREADS, "fabula-server")
        self._sessions: OrderedDict[tuple[str, str], Session] = OrderedDict()
        self._sessions_lock = threading.Lock()  # of the dict alone
        self._opening = threading.Condition()  # of the dict below alone
        self._places: dict[str, list[object]] = {}  # of sessions that are being created, by key, the first ones first
        self._new: WeakSet[Session] = WeakSet()  # created by this process; some have no turn yet
        self._later: set[asyncio.Task[None]] = set()
        self._added: set[str] = set()  # models that a client added
        self.gate: Gate = Gate(settings, None)
        self._loading: asyncio.Task[None] | None = None

    # ---- Life -------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Starts loading the models."""
        asyncio.get_running_loop().set_default_executor(self._threads)
        self._loading = asyncio.create_task(self._load_all())

    async def _load_all(self) -> None:
        for serving in list(self.models.values()):
            await self._load_one(serving)

    async def _load_one(self, serving: Serving) -> None:
        if serving.is_stopping:
            return
        try:
            await asyncio.to_thread(self._load, serving)
        except Exception as error:
            if serving.is_stopping:
                return
            serving.state = "failed"
            serving.error = str(error) if isinstance(error, EngineError) else "see the server's log"
            notify(self.observers, Observer.failed, None, error)

    def _load(self, serving: Serving) -> None:
        settings = self.settings
        serving.state = "loading"
        serving.model = self.workspace.load(
            serving.place,
            name=serving.name,
            weights=cast(Any, settings.weights),
            kv=cast(Any, settings.kv),
            context=settings.context,
            kv_memory=settings.kv_memory,
            state_memory=settings.state_memory,
            window_kv=cast(Any, settings.window_kv),
            ignore_memory=settings.ignore_memory,
            bf16_inputs=cast(Any, settings.bf16_inputs),
            device=settings.device,
            device_memory=settings.device_memory,
            tensor_parallel=settings.tensor_parallel,
            device_products=settings.device_products,
            speculation=cast(Any, settings.speculation),
            draft_model=settings.draft_model,
            threads=settings.threads,
            pin_threads=settings.pin_threads,
            fetch=settings.fetch,
            fetch_progress=serving,
            load_progress=serving.loaded,
        )
        serving.read_usage()
        serving.state = "ready"

    @property
    def is_ready(self) -> bool:
        """Whether every model is loaded."""
        return all(serving.state == "ready" for serving in self.models.values())

    async def stop(self) -> None:
        """Stops loading and all runs; the workspace stays open."""
        for serving in self.models.values():
            serving.is_stopping = True
        if self._loading is not None:
            await asyncio.wait([self._loading])
        await asyncio.gather(*(run.stop(stopped()) for run in self.runs.active()))
        await asyncio.gather(*self._later, return_exceptions=True)
        self._sessions.clear()

    # ---- Models and sessions ----------------------------------------------------------------------------------------

    def model(self, name: str | None) -> Serving:
        """A model that is ready; name None means the first.

        Raises:
            ApiError: 404, there is none of that name; 503, it is not loaded yet, or could not be.
        """
        serving = next(iter(self.models.values())) if name is None else self.models.get(name)
        if serving is None:
            raise not_found("model", name or "")
        if serving.state == "failed":
            raise ApiError(503, "model_failed", f"model {serving.name} could not be loaded; /health has the reason")
        if serving.state != "ready" or serving.model is None:
            raise ApiError(503, "model_loading", f"model {serving.name} is still loading; retry soon", retry_after=1)
        return serving

    def model_for(self, name: str | None) -> Serving:
        """The model of a request to a borrowed API, whose clients have names of their own for it.

        Args:
            name: a model's name, also with a provider's before it or a tag behind it, in any case; None or "" means the
                first. Where one model is served, any name is its, unless the setting `model_names` is "exact".

        Raises:
            ApiError: as `model`; 404 names the models there are.
        """
        names = list(self.models)
        if not name or name in self.models:
            return self.model(name or None)
        if self.settings.model_names == "any":
            last = name.rpartition("/")[2].removesuffix(":latest").casefold()
            found = [one for one in names if one.casefold() in (name.casefold(), last)]
            if len(found) == 1 or len(names) == 1:
                return self.model((found or names)[0])
        raise ApiError(
            404, "model_not_found", f"there is no model {name[:128]!r}; there are {', '.join(names)}", param="model"
        )

    def add_model(self, place: str) -> Serving:
        """Serves one more model, which loads in the background. One that failed is tried again.

        Raises:
            ApiError: 429, MAX_ADDED were added.
        """
        found = self.models.get(place)
        if found is not None and found.state != "failed":
            return found
        if len(self._added - {place}) >= MAX_ADDED:
            raise ApiError(429, "too_many_models", f"{MAX_ADDED} models were added; delete one", limit=MAX_ADDED)
        self._added.add(place)
        serving = self.models[place] = Serving(place, place)
        self.later(self._load_one(serving))
        return serving

    async def remove_model(self, serving: Serving) -> None:
        """Unloads a model that `add_model` added. Its answers end with an error; its sessions stay.

        Raises:
            ApiError: 400, the server was started with it; 409, it is loading.
        """
        name = serving.name
        if name not in self._added:
            raise ApiError(400, "unsupported", f"model {name} cannot be deleted: the server was started with it")
        if serving.state not in ("ready", "failed"):
            raise ApiError(409, "model_loading", f"model {name} is still loading; delete it later")
        del self.models[name]
        self._added.discard(name)
        if serving.model is not None:
            await self.call(lambda: self.workspace.unload(name))

    def later(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs a coroutine in the background; `stop` waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._later.add(task)
        task.add_done_callback(self._later.discard)

    async def call(self, function: Callable[[], T]) -> T:
        """Runs a blocking function in a worker thread."""
        return await asyncio.to_thread(function)

    def open(self, tenant: str, id: str) -> Session:
        """A session that exists; blocks.

        Raises:
            SessionNotFound: there is none, or it belongs to another key.
            ApiError: its model is not served, or not ready.
        """
        return self._served(self.workspace.open(id, tenant=tenant))

    def _served(self, session: Session) -> Session:
        if session.model not in self.models:
            raise ApiError(
                409, "model_not_served", f"the session uses the model {session.model}, which this server does not serve"
            )
        self.model(session.model)
        self.remember(session)
        return session

    @contextmanager
    def joined(
        self, tenant: str, id: str | None, model: str | None, sampling: Sampling | None = None, **settings: Any
    ) -> Iterator[Session]:
        """The session with that id, or a new one, which is deleted if the block raises; blocks.

        Args:
            tenant, id, model: of the session; id None creates one.
            sampling: settings to change, as PATCH does.
            settings: others, as `Workspace.session`; None leaves one as it is.

        Raises:
            InvalidArgument: a setting is invalid, or cannot change any more.
            ApiError: as `open` and `opening`.
        """
        check_free(id)
        if id is not None and self.workspace.has(id, tenant=tenant):
            session = self.open(tenant, id)
            if sampling is not None:
                settings["sampling"] = sampling.changed(session.params)
            given = {name: value for name, value in settings.items() if value is not None}
            yield self.workspace.session(id, tenant=tenant, model=model, **given) if given or model else session
            return
        if sampling is not None:
            settings["sampling"] = sampling.changed(SamplingParams())
        with self.opening(tenant, id):
            session = self.workspace.session(id, tenant=tenant, model=self.model(model).name, **settings)
        self.remember(session, is_new=True)
        try:
            yield session
        except BaseException:
            self.drop_empty(session)
            raise

    def keep_empty(self, session: Session) -> None:
        """A session stays also if it never gets a turn: somebody asked for it."""
        self._new.discard(session)

    def drop_empty(self, session: Session) -> None:
        """Deletes a session that was created for an answer that never came, unless it is in use; blocks."""
        if session in self._new and not session.n_turns and not session.is_busy:
            self._new.discard(session)
            with suppress(SessionNotFound):
                self.delete(session)

    def delete(self, session: Session) -> int:
        """Deletes a session; blocks.

        Returns:
            Bytes of KV cache that were freed.
        """
        self.forget(session)
        return session.delete()

    @contextmanager
    def opening(self, tenant: str, id: str | None) -> Iterator[None]:
        """Checks that a key may have one more session, and holds that place during the block; blocks.

        Sessions are created side by side. Only for the last places one waits for those that came before it.

        Raises:
            ApiError: 400, the id is reserved; 429, the key has too many sessions.
        """
        check_free(id)
        place = object()
        with self._opening:
            places = self._places.setdefault(tenant, [])
            places.append(place)
        try:
            self._take_place(tenant, places, place)
            yield
        finally:
            with self._opening:
                places.remove(place)
                if not places and self._places.get(tenant) is places:
                    del self._places[tenant]
                self._opening.notify_all()

    def _take_place(self, tenant: str, places: list[object], place: object) -> None:
        """Raises ApiError 429 if there is no room for this place and those before it, also when they are settled."""
        while n_before := places.index(place):
            with suppress(ApiError):
                self.limits.check_sessions(tenant, n_before)  # without the lock: it reads from the store
                return
            with self._opening:
                self._opening.wait_for(lambda n=n_before: places.index(place) < n)  # type: ignore[misc]
        self.limits.check_sessions(tenant)

    def remember(self, session: Session, *, is_new: bool = False) -> None:
        """Keeps the trees of the last N_SESSIONS sessions in memory.

        Args:
            session: moves to the front.
            is_new: created for the current request; `drop_empty` may delete it.
        """
        key = (session.tenant, session.id)
        with self._sessions_lock:
            if is_new:
                self._new.add(session)
            self._sessions[key] = session
            self._sessions.move_to_end(key)
            oldest = [self._sessions.popitem(last=False) for _ in range(len(self._sessions) - N_SESSIONS)]
        del oldest  # outside the lock: this may destroy a session

    def forget(self, session: Session) -> None:
        """Removes a deleted session from memory."""
        with self._sessions_lock:
            self._sessions.pop((session.tenant, session.id), None)

    # ---- Runs -------------------------------------------------------------------------------------------------------

    def begin(self, run: Run) -> Run:
        """Adds a run; from now on it counts against its key's limit."""
        self.runs.add(run)
        return run

    def load(self) -> dict[str, int]:
        """Numbers of running and waiting answers."""
        load = self.workspace.load_now
        return {"running": load.n_running, "waiting": load.n_waiting}


def server() -> Server:
    """The server that handles the current request."""
    found = current_app.extensions["fabula"]
    if not isinstance(found, Server):
        raise InvalidArgument("the app was not made by fabula.server.create_app")
    return found
