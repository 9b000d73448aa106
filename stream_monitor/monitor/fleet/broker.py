"""The connection to NATS, and the stream on it. Nothing else here knows the library.

A connection that is lost is not mended but replaced: nothing waits inside the library, where it could neither be
counted nor kept, and what is to be sent again stands in the outbox.
"""

import asyncio
import contextlib
import hashlib
import logging
import ssl
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from stream_monitor.addresses import is_local
from stream_monitor.config import OnStream, SettingsError
from stream_monitor.monitor.fleet import names
from stream_monitor.monitor.fleet.messages import Outgoing

try:
    import nats
    from nats.aio.client import Client
    from nats.js import JetStreamContext, api
    from nats.js import errors as jetstream
except ImportError:
    raise SettingsError("nats: the package nats-py is not installed: pip install 'stream-monitor[fleet]'") from None

CONNECT_SECONDS, ANSWER_SECONDS = 5.0, 5.0
PING_SECONDS = 20
"""How often the broker is asked whether it is there; after two questions without an answer, it is not."""
RETRY_SECONDS = (0.25, 1.0, 2.0, 5.0, 10.0)
DUPLICATE_SECONDS = 120.0
"""For how long the broker itself recognises a message that is sent again; beyond that, the fleet does."""
CONSUMER_DAYS = 7.0
"""After which the broker forgets the durable consumer of a process that does not come back."""
DELETIONS_SECONDS, DELETIONS_TOGETHER = 1.0, 1000

log = logging.getLogger(__name__)


class BrokerTrouble(Exception):
    """Something cannot be done now. `reason` is one of `metric_table.REASONS`; the message is one line."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Session:
    """One connection with the stream on it. Every method raises BrokerTrouble.

    Attributes:
        stream: its name.
        epoch: names this stream, not another one of its name that was made later.
        limit: bytes of the largest message.
        closed: set once the connection is gone.
    """

    def __init__(self, client: Client, closed: asyncio.Event, info: api.StreamInfo) -> None:
        assert info.config.name is not None
        self.stream = info.config.name
        self.epoch = hashlib.blake2b(f"{self.stream}\0{info.created}".encode(), digest_size=16).hexdigest()
        size = info.config.max_msg_size or -1
        self.limit = min(client.max_payload, size) if size > 0 else client.max_payload
        self.days = (info.config.max_age or 0) / 86_400
        self.max_bytes = max(0, info.config.max_bytes or 0)
        self.closed = closed
        self._client = client
        self._jetstream: JetStreamContext = client.jetstream(timeout=ANSWER_SECONDS)

    async def publish(self, message: Outgoing) -> None:
        """Have the broker keep a message; returns when it does."""
        async with self._telling():
            await self._jetstream.publish(
                message.subject, message.body, stream=self.stream, headers=dict(message.headers)
            )

    async def erase(self, request: str) -> int:
        """Remove all messages of a request, by its hash, and overwrite them; how many there were."""
        found, sequence = 0, 1
        while True:
            async with self._telling():
                try:
                    held = await self._jetstream.get_msg(
                        self.stream, seq=sequence, subject=names.subjects_of(self.stream, request), next=True
                    )
                except jetstream.NotFoundError:
                    return found
            assert held.seq is not None
            await self.erase_one(held.seq)
            found, sequence = found + 1, held.seq + 1

    async def erase_one(self, sequence: int) -> None:
        """Remove one message and overwrite it, if it is still there."""
        async with self._telling():
            try:
                await self._jetstream.delete_msg(self.stream, sequence)
            except jetstream.APIError as error:
                if error.err_code not in _NO_SUCH_MESSAGE and "no message found" not in str(error):
                    raise

    async def state(self) -> api.StreamState:
        """What the stream holds."""
        async with self._telling():
            return (await self._jetstream.stream_info(self.stream)).state

    async def deletions(self) -> AsyncIterator[list[str]]:
        """Hashes of the requests that were deleted: of all that are in the stream, then of each that comes."""
        subscription = None
        async with self._telling():
            subscription = await self._jetstream.subscribe(
                names.tombstone(self.stream, "*"),
                stream=self.stream,
                ordered_consumer=True,
                deliver_policy=api.DeliverPolicy.ALL,
            )
        waiting: list[str] = []
        while True:
            async with self._telling():
                try:
                    message = await subscription.next_msg(timeout=0.05 if waiting else DELETIONS_SECONDS)
                except TimeoutError:
                    if self.closed.is_set():
                        raise nats.errors.ConnectionClosedError from None
                else:
                    waiting.append(message.subject.rpartition(".")[2])
                    if len(waiting) < DELETIONS_TOGETHER:
                        continue
            if waiting:
                yield waiting
                waiting = []

    async def consume(self, durable: str, after: int) -> "Consumer":
        """The durable consumer of that name, from after a sequence on."""
        config = api.ConsumerConfig(
            durable_name=durable,
            description="a process of a Stream Monitor fleet",
            deliver_policy=api.DeliverPolicy.BY_START_SEQUENCE,
            opt_start_seq=after + 1,
            ack_policy=api.AckPolicy.ALL,
            inactive_threshold=CONSUMER_DAYS * 86_400,
        )
        async with self._telling():
            # The store says where to go on, so a consumer left by an earlier start does not.
            with contextlib.suppress(jetstream.NotFoundError):
                await self._jetstream.delete_consumer(self.stream, durable)
            await self._jetstream.add_consumer(self.stream, config)
            return Consumer(self, await self._jetstream.pull_subscribe_bind(durable, self.stream))

    async def close(self) -> None:
        """End the connection."""
        with contextlib.suppress(nats.errors.Error, OSError, asyncio.TimeoutError):
            await asyncio.wait_for(self._client.close(), ANSWER_SECONDS)

    @contextlib.asynccontextmanager
    async def _telling(self) -> AsyncIterator[None]:
        try:
            yield
        except asyncio.CancelledError:
            # The library cancels what waits for a connection that it closes.
            _go_if_cancelled()
            raise BrokerTrouble("unreachable", "the connection was lost") from None
        except (nats.errors.Error, OSError, TimeoutError) as error:
            # It also takes our own cancelling for its errors.
            _go_if_cancelled()
            raise trouble(error) from None


def _go_if_cancelled() -> None:
    """Raises CancelledError if this task is to end."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


class Consumer:
    """Reads a stream in order, without gaps. Raises BrokerTrouble where it cannot, such as after a lost delivery."""

    def __init__(self, session: Session, subscription: JetStreamContext.PullSubscription) -> None:
        self._session = session
        self._subscription = subscription
        self._delivered = 0
        self.pending = 0

    async def next(self, count: int, seconds: float) -> list[Any]:
        """The next messages of the library, at most `count`; empty if none comes in time."""
        async with self._session._telling():
            try:
                fetched = await self._subscription.fetch(count, timeout=seconds)
            except TimeoutError:
                _go_if_cancelled()
                fetched = []
        if not fetched:
            self.pending = 0
            return []
        for message in fetched:
            delivery = message.metadata.sequence.consumer
            if delivery != self._delivered + 1:
                raise BrokerTrouble("error", "the broker delivered out of order")
            self._delivered = delivery
        self.pending = fetched[-1].metadata.num_pending
        return fetched

    async def done(self, message: Any) -> None:
        """All up to this message are kept here."""
        async with self._session._telling():
            await message.ack()


class _Client(Client):
    """Speaks TLS with every broker, if it was told how to. The library alone does so where the broker asks for it, in
    the clear: who stands between could ask for nothing, and be given the password."""

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        if "tls" in self.options:
            info["tls_required"] = True
        await super()._process_info(info, initial_connection)


class Broker:
    """Connects, again and again; makes the stream where there is none.

    Attributes:
        trouble: which of `metric_table.REASONS` it is that keeps us from the stream; empty while there is a connection.
        failures: what went wrong so far, by reason.
    """

    def __init__(self, settings: OnStream, insecure: bool, client_name: str) -> None:
        """Raises SettingsError if a file cannot be used, or secrets would go over a network in the clear."""
        self.trouble = "unreachable"
        self.failures: Counter[str] = Counter()
        self._settings = settings
        self._urls = settings.nats.split(",")
        self._options: dict[str, Any] = {"name": client_name} | _credentials(settings.nats_credentials)
        if tls := _tls(settings):
            self._options["tls"] = tls
        elif not insecure:
            for url in self._urls:
                if not is_local(url.removeprefix("nats://")):
                    raise SettingsError(f"nats: {url} is another host, without TLS; use tls://, or --insecure")
        self._session: Session | None = None
        self._connecting = asyncio.Lock()
        self._said = ""

    @property
    def address(self) -> str:
        """For people."""
        return self._settings.nats

    @property
    def current(self) -> Session | None:
        """The connection, if there is one now."""
        session = self._session
        return session if session is not None and not session.closed.is_set() else None

    async def session(self) -> Session:
        """A connection; waits for as long as there is none."""
        async with self._connecting:
            attempt = 0
            while (held := self.current) is None:
                try:
                    held = self._session = await self._open()
                except BrokerTrouble as error:
                    self.failed(error)
                    await asyncio.sleep(RETRY_SECONDS[min(attempt, len(RETRY_SECONDS) - 1)])
                    attempt += 1
                    continue
                if self._said:
                    log.warning("nats: %s: connected, stream %s", self.address, held.stream)
                self.trouble = self._said = ""
            return held

    def failed(self, error: BrokerTrouble) -> None:
        """Count, and say once, what is wrong."""
        self.failures[error.reason] += 1
        self.trouble = error.reason
        if str(error) != self._said:
            self._said = str(error)
            log.error("nats: %s: %s; it is tried again", self.address, error)

    def worked(self) -> None:
        """The broker took what it was sent."""
        self.trouble = self._said = ""

    async def close(self) -> None:
        """End the connection."""
        if self._session is not None:
            await self._session.close()

    async def _open(self) -> Session:
        client, closed = _Client(), asyncio.Event()
        heard: list[Exception] = []

        async def on_error(error: Exception) -> None:
            heard.append(error)

        async def on_closed() -> None:
            closed.set()
            self.trouble = "unreachable"

        connecting = client.connect(
            self._urls,
            allow_reconnect=False,
            max_reconnect_attempts=1,
            reconnect_time_wait=0,
            connect_timeout=int(CONNECT_SECONDS),
            ping_interval=PING_SECONDS,
            error_cb=on_error,
            closed_cb=on_closed,
            disconnected_cb=on_closed,
            **self._options,
        )
        try:
            await asyncio.wait_for(connecting, CONNECT_SECONDS * 2)
            return Session(client, closed, await self._stream(client.jetstream(timeout=ANSWER_SECONDS)))
        except (TimeoutError, nats.errors.Error, OSError, ValueError) as error:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(client.close(), ANSWER_SECONDS)
            _go_if_cancelled()
            raise trouble(heard[0] if heard else error) from None
        except BrokerTrouble:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(client.close(), ANSWER_SECONDS)
            raise

    async def _stream(self, context: JetStreamContext) -> api.StreamInfo:
        """The stream, made if there is none. Raises BrokerTrouble if it is not one for us."""
        settings = self._settings
        name, subjects = settings.nats_stream, [f"{settings.nats_stream}.>"]
        wanted = api.StreamConfig(
            name=name,
            description="Findings and traces of Stream Monitor",
            subjects=subjects,
            max_age=settings.nats_days * 86_400,
            max_bytes=settings.nats_bytes,
            num_replicas=settings.nats_replicas,
            duplicate_window=min(DUPLICATE_SECONDS, settings.nats_days * 86_400),
            storage=api.StorageType.FILE,
        )
        try:
            info = await context.stream_info(name)
        except jetstream.NotFoundError:
            try:
                return await context.add_stream(wanted)
            except jetstream.BadRequestError as error:
                if error.err_code != _STREAM_NAME_IN_USE:
                    raise
                info = await context.stream_info(name)  # Another process was quicker.
        if unfit := _unfit(info.config, subjects):
            raise BrokerTrouble("stream", f"stream {name} {unfit}; name another one with --nats-stream")
        differing = [
            f"{limit} {getattr(info.config, limit)} (settings: {getattr(wanted, limit)})"
            for limit in ("max_age", "max_bytes", "num_replicas")
            if getattr(info.config, limit) != getattr(wanted, limit)
        ]
        if differing:
            log.warning("nats: stream %s keeps its own limits: %s", name, ", ".join(differing))
        return info


_NO_SUCH_MESSAGE = (10037, 10043)
"""No message found; sequence not found."""
_STREAM_NAME_IN_USE = 10058
_NO_JETSTREAM = (10039, 10076)
_FULL = (10023, 10028, 10047, 10077)
"""Resources, memory or storage exceeded; the stream refused to store the message."""


def trouble(error: BaseException) -> BrokerTrouble:
    """What an error of the library means."""
    text = str(error).removeprefix("nats: ").strip("'") or type(error).__name__
    if isinstance(error, jetstream.APIError):
        text = error.description or text
        if error.err_code in _FULL:
            return BrokerTrouble("full", f"the broker has no room: {text}")
        if error.err_code in _NO_JETSTREAM or (isinstance(error, jetstream.ServiceUnavailableError) and not error.code):
            return BrokerTrouble("no_jetstream", "the broker has no JetStream for us; start it with -js")
        return BrokerTrouble("error", f"the broker refused: {text}")
    if isinstance(error, jetstream.NoStreamResponseError):
        return BrokerTrouble("stream", "the stream is gone")
    lowered = text.lower()
    if isinstance(error, nats.errors.AuthorizationError) or "authorization" in lowered or "authentication" in lowered:
        return BrokerTrouble("credentials", "the broker refused our credentials (setting nats_credentials)")
    if "permissions violation" in lowered:
        return BrokerTrouble("credentials", f"the broker does not permit us what we need: {text}")
    if isinstance(error, ssl.SSLError | nats.errors.SecureConnRequiredError | nats.errors.SecureConnWantedError):
        return BrokerTrouble("tls", f"no TLS with the broker: {text}")
    if isinstance(error, asyncio.TimeoutError):
        return BrokerTrouble("timeout", f"the broker did not answer within {ANSWER_SECONDS:g} s")
    if isinstance(
        error, OSError | nats.errors.NoServersError | nats.errors.ConnectionClosedError | nats.errors.UnexpectedEOF
    ):
        return BrokerTrouble("unreachable", f"no broker answers: {text}")
    return BrokerTrouble("error", text)


def _unfit(config: api.StreamConfig, subjects: list[str]) -> str:
    """Why a stream that somebody else made cannot be used; empty if it can."""
    if not set(subjects) <= set(config.subjects or ()):
        return f"does not take the subjects {subjects[0]}"
    if config.retention != api.RetentionPolicy.LIMITS:
        return f"has the retention {config.retention}, not limits: what one reads would be gone for the others"
    if config.deny_delete:
        return "does not let messages be deleted (deny_delete), so requests could not be"
    if config.no_ack:
        return "does not acknowledge (no_ack), so nobody could know what it holds"
    if (config.max_msgs_per_subject or -1) > 0:
        return "keeps some messages of a subject alone (max_msgs_per_subject), so findings would be lost"
    return ""


def _credentials(path: str) -> dict[str, Any]:
    """The library's options for a file of credentials."""
    if not path:
        return {}
    try:
        content = Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"nats_credentials: cannot read {path}: {getattr(error, 'strerror', 'not text')}") from None
    if "BEGIN NATS USER JWT" in content:
        return {"user_credentials": path}
    if not content or "\n" in content:
        raise SettingsError(f"nats_credentials: {path} must be a .creds file, or one line: user:password, or a token")
    user, colon, password = content.partition(":")
    return {"user": user, "password": password} if colon else {"token": content}


def _tls(settings: OnStream) -> ssl.SSLContext | None:
    """How to speak TLS with the brokers, all of them; None if no setting and no address asks for it."""
    files = {name: getattr(settings, name) for name in ("nats_ca", "nats_certificate", "nats_key")}
    asked = any(url.startswith("tls://") for url in settings.nats.split(","))
    if not any(files.values()) and not asked:
        return None
    if bool(files["nats_certificate"]) != bool(files["nats_key"]):
        raise SettingsError("nats_certificate and nats_key belong together: name both files, or none")
    for name, path in files.items():
        try:
            if path and not Path(path).is_file():
                raise SettingsError(f"{name}: no file {path}")
        except OSError as error:
            raise SettingsError(f"{name}: cannot look at {path}: {error.strerror}") from None
    try:
        context = ssl.create_default_context(cafile=files["nats_ca"] or None)
        if files["nats_certificate"]:
            context.load_cert_chain(files["nats_certificate"], files["nats_key"])
    except (ssl.SSLError, OSError) as error:
        raise SettingsError(f"nats_ca, nats_certificate, nats_key: cannot be used: {error}") from None
    return context
