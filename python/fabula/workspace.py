"""`Workspace`: durable sessions in a data folder, with their store, spilled KV pages, and the loaded models."""

from __future__ import annotations

import os
import re
import sys
import threading
import uuid
from collections.abc import Mapping
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

from fabula.choices import DEFAULT_MODEL
from fabula.engine.sampling import SamplingParams
from fabula.engine.scheduler import MAX_RUNNING, MAX_WAITING, Load, Scheduler
from fabula.errors import InvalidArgument, SessionNotFound, StoreError
from fabula.keyed_lock import KeyedLocks
from fabula.kv.spill import SpillFolder
from fabula.kv.spill_writer import SpillWriter
from fabula.model import Model
from fabula.sessions.archive import import_session
from fabula.sessions.model_handle import LoadedModel, ModelHandle
from fabula.sessions.names import is_session_id
from fabula.sessions.persistence import Persistence, params_of, policy_of
from fabula.sessions.policy import ContextPolicy
from fabula.sessions.session import Session
from fabula.sessions.turn import START
from fabula.store.records import Match, SessionSummary
from fabula.store.store import Store

SPILL_BYTES = 1 << 30


def default_folder() -> Path:
    """The default data folder: $FABULA_DATA, or `fabula` in the user's data folder."""
    if "FABULA_DATA" in os.environ:
        return Path(os.environ["FABULA_DATA"])
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "fabula"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "fabula"


class Workspace:
    """Durable sessions and their models.

    Example:
        >>> with Workspace() as workspace:
        ...     session = workspace.session("letters")
        ...     print(session.say("Where were we?").text())

    Only one process at a time can use a folder. Models are loaded by `load`, or when a session needs its model. One
    scheduler runs the requests of all models.

    Args:
        folder: data folder; None for `default_folder`.
        store: SQLAlchemy URL of the sessions, such as PostgreSQL; None for a file in the folder.
        spill_bytes: limit of KV pages on disk per model, in bytes; 0 for none.
        max_running, max_waiting: limits of running and of queued requests.

    Raises:
        StoreLocked: another process uses the folder.
        StoreReadOnly, StoreCorrupt, StoreTooNew, StoreError: it cannot be used; says why.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        store: str | None = None,
        spill_bytes: int = SPILL_BYTES,
        max_running: int = MAX_RUNNING,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        self.folder = default_folder() if folder is None else Path(folder)
        self._spill_bytes = spill_bytes
        self._scheduler = Scheduler(max_running=max_running, max_waiting=max_waiting)
        self._keeper = Persistence(Store.open(self.folder if store is None else store))
        self._hosts: dict[str, ModelHandle] = {}
        self._models: dict[str, Model] = {}
        self._spills: dict[str, SpillWriter] = {}
        self._options: dict[str, dict[str, Any]] = {}
        self._loading = KeyedLocks()  # by model, held while it is loaded or unloaded; taken before _lock
        self._lock = threading.RLock()  # of the dicts alone: never held over a load, the disk or a commit
        self._closed = False

    # ---- Models -----------------------------------------------------------------------------------------------------

    def load(self, model: str | os.PathLike[str] = DEFAULT_MODEL, *, name: str | None = None, **options: Any) -> Model:
        """Loads a model if it is not loaded yet.

        Args:
            model: see `Model.load`.
            name: its name in sessions; None for `model`.
            options: see `Model.load`.

        Raises:
            The errors of `Model.load`.
        """
        name = os.fspath(model) if name is None else name
        with self._loading.of(name):
            with self._lock:
                self._check_open()
                if name in self._models:
                    return self._models[name]
                self._options[name] = {"name_or_path": model, **options}
            loaded = Model.load(model, scheduler=self._scheduler, **options)
            spill: SpillWriter | None = None
            try:
                self._check_open()
                spill, why_cold = self._open_spill(name, loaded)
                loaded._engine.cache.spill = spill
                served = LoadedModel(loaded._engine, loaded._template, loaded._fingerprint, why_cold, loaded.defaults)
                with self._lock:
                    self._check_open()
                    self._host(name).attach(served)
                    self._models[name] = loaded
                    if spill is not None:
                        self._spills[name] = spill
            except BaseException:
                loaded.close()
                if spill is not None:
                    spill.close()
                raise
            return loaded

    def unload(self, name: str) -> None:
        """Frees a model. Its sessions stay and load it again when needed. Its running replies end with an error.

        Raises:
            InvalidArgument: it is not loaded.
        """
        with self._loading.of(name):
            with self._lock:
                model = self._models.pop(name, None)
                if model is None:
                    raise InvalidArgument(f"{name} is not loaded; loaded are {', '.join(self._models) or 'none'}")
                self._hosts[name].detach()
                spill = self._spills.pop(name, None)
            model._engine.scheduler.drop(model._runner)
            model._engine.cache.save_all()
            model.close()
            if spill is not None:
                spill.close()

    @property
    def models(self) -> dict[str, Model]:
        """The loaded models by name."""
        with self._lock:
            return dict(self._models)

    @property
    def load_now(self) -> Load:
        """The number of running and of queued requests."""
        return self._scheduler.load

    def _open_spill(self, name: str, model: Model) -> tuple[SpillWriter | None, str]:
        """Where KV pages of a model are kept on disk, and why those on disk cannot be used, if so. None: nowhere."""
        if not self._spill_bytes:
            return None, ""
        fingerprint = model.fingerprint
        slug = re.sub(r"[^A-Za-z0-9.-]+", "_", name)[-40:] + "-" + blake2b(name.encode(), digest_size=4).hexdigest()
        try:
            pool = model._runner.pool
            spill = SpillFolder(
                self.folder / "pages" / slug, fingerprint, pool.page_bytes, self._spill_bytes, pool.state_record_bytes
            )
        except StoreError as error:  # sessions work without: the KV cache can be recomputed
            return None, f"pages are not kept on disk: {error}"
        others = spill.other_fingerprints()
        is_cold = others and not spill.n_pages
        why = f"the pages on disk are of another model: {fingerprint.difference(others[0])}" if is_cold else ""
        return SpillWriter(spill), why

    def _host(self, name: str) -> ModelHandle:
        with self._lock:
            if name not in self._hosts:
                self._hosts[name] = ModelHandle(name, load=lambda: self._load_again(name))
            return self._hosts[name]

    def _load_again(self, name: str) -> None:
        options = self._options.get(name, {"name_or_path": name})
        self.load(options["name_or_path"], name=name, **{k: v for k, v in options.items() if k != "name_or_path"})

    # ---- Sessions ---------------------------------------------------------------------------------------------------

    def session(
        self,
        id: str | None = None,
        *,
        model: str | None = None,
        system: str | None = None,
        sampling: SamplingParams | None = None,
        context_policy: ContextPolicy | str | None = None,
        title: str | None = None,
        tenant: str = "",
    ) -> Session:
        """Opens a session, or creates it.

        Args:
            id: its name; None for a new one with a random name.
            model: name of its model; None for the only loaded one, or the default.
            system, sampling, context_policy: see `Model.session`; for an existing session, those that are given apply
                to later turns.
            title: for display, one line of at most 200 characters; None keeps it, or leaves it empty.
            tenant: its owner; the same id may exist for two.

        Raises:
            InvalidArgument: a setting is out of range, or the session uses another model.
            StoreError, StoreCorrupt: it cannot be read or written.
        """
        self._check_open()
        id = uuid.uuid4().hex if id is None else id
        with self._keeper.exclusive(tenant, id):
            found = self._find(tenant, id) if is_session_id(id) else None
            if found is None:
                session = Session(
                    self._host(model or self._default_model()),
                    id=id,
                    tenant=tenant,
                    system=system,
                    params=sampling,
                    policy=context_policy,
                    persistence=self._keeper,
                    title=title or "",
                )
                self._keeper.register(session)
        if found is None:
            self._keeper.create(session)
            return session
        if model is not None and model != found.model:
            raise InvalidArgument(f"session {found.id} uses the model {found.model}, not {model}")
        if context_policy is not None and ContextPolicy.of(context_policy) != found.policy:
            raise InvalidArgument(
                f"session {found.id} has the context policy {found.policy.name}, which cannot be changed"
            )
        found.configure(title=title, sampling=sampling, system=system)
        return found

    def open(self, id: str, *, tenant: str = "") -> Session:
        """Opens an existing session.

        Raises:
            SessionNotFound: no session has that name.
            StoreCorrupt: it is damaged; says what.
        """
        self._check_open()
        found = None
        if is_session_id(id):
            found = self._keeper.sessions.get((tenant, id))
            if found is None:
                with self._keeper.exclusive(tenant, id):  # or two threads would make two objects of one session
                    found = self._find(tenant, id)
        if found is None:
            raise SessionNotFound(f"there is no session {id!r}")
        return found

    def sessions(self, tenant: str | None = None) -> list[SessionSummary]:
        """Sessions of a tenant, or all; the last changed first."""
        return self._keeper.store.sessions(tenant)

    def search(
        self,
        text: str,
        *,
        session_id: str | None = None,
        tenant: str = "",
        but: str = "",
        limit: int = 100,
        offset: int = 0,
    ) -> list[Match]:
        """Turns whose prompt or answer has a text, in any case; the last made first.

        Args:
            text: to find.
            session_id: of the only session to search; None for all of the tenant's.
            tenant: their owner.
            but: sessions whose ids begin with it are left out; "" for none.
            limit, offset: which of the matches.

        Raises:
            InvalidArgument: the text is empty, limit is not positive or offset negative.
        """
        if not text:
            raise InvalidArgument("there is nothing to search for: the text is empty")
        if limit < 1 or offset < 0:
            raise InvalidArgument(f"limit is {limit}, must be 1 or more; offset is {offset}, must be 0 or more")
        return self._keeper.store.search(tenant, text, session_id=session_id, but=but, limit=limit, offset=offset)

    def has(self, id: str, *, tenant: str = "") -> bool:
        """Whether a session has that name; False for an invalid name."""
        if not is_session_id(id):
            return False
        live = self._keeper.sessions.get((tenant, id))
        return live is not None or self._keeper.store.find(tenant, id) is not None

    def n_sessions(self, tenant: str | None = None, *, but: str = "") -> int:
        """The number of sessions, of one tenant or all; excludes names that begin with `but`."""
        return self._keeper.store.count(tenant, but)

    def import_(
        self,
        data: Mapping[str, Any],
        *,
        id: str | None = None,
        tenant: str = "",
        kv: str | os.PathLike[str] | None = None,
    ) -> Session:
        """Imports the data of `Session.export` as a session.

        Args:
            data: JSON data.
            id: its name; None for its former name.
            tenant: its owner.
            kv: file with its KV cache; loads the model.

        Raises:
            SessionExists: a session has that name already.
            InvalidArgument: the data is invalid; says what.
            StoreError, StoreCorrupt: it cannot be stored, or the KV cache is damaged or of another model.
        """
        self._check_open()
        model = data.get("model") if isinstance(data, Mapping) else None
        host = self._host(model if isinstance(model, str) and model else self._default_model())
        if kv is not None:
            _ = host.loaded  # loads it
        return import_session(data, host, id=id, tenant=tenant, kv=kv, persistence=self._keeper)

    def delete(self, id: str, *, tenant: str = "") -> int:
        """Deletes a session, and returns the freed bytes of the KV cache.

        Raises:
            SessionNotFound: no session has that name.
        """
        return self.open(id, tenant=tenant).delete()

    def _find(self, tenant: str, id: str) -> Session | None:
        """A session in use, or from the store; the caller has its name to itself (`Persistence.exclusive`)."""
        keeper = self._keeper
        live = keeper.sessions.get((tenant, id))
        if live is not None:
            return live
        if keeper.store.find(tenant, id) is None:
            return None
        record, own, known = keeper.load(tenant, id)
        session = Session(
            self._host(record.model),
            id=id,
            tenant=tenant,
            system=record.settings["system"],
            params=params_of(record.settings["params"]),
            policy=policy_of(record.settings),
            base=known.get(record.base_id or ""),
            persistence=keeper,
            created_at=record.created_at,
            vocabulary=record.settings["vocabulary"],
            title=record.settings.get("title", ""),
            tags=record.settings.get("tags", ()),
        )
        redo_stack = [known.get(id, START) for id in record.undone]
        session._tree.restore(own, known.get(record.head_id or "", START), redo_stack)
        keeper.add(session)
        return session

    def _default_model(self) -> str:
        names = list(self.models)
        if len(names) > 1:
            raise InvalidArgument(f"several models are loaded; name one of {', '.join(names)}")
        return names[0] if names else DEFAULT_MODEL

    # ---- Closing ----------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise InvalidArgument("the workspace is closed")

    def close(self) -> None:
        """Unloads all models, saving KV pages to disk, and closes the store. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for session in self._keeper.in_use:
            with suppress(StoreError):
                session.stop()
        for name in self.models:
            with suppress(InvalidArgument):  # another thread was quicker
                self.unload(name)
        self._keeper.store.close()

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
