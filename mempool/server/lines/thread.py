"""The thread that has all lines of a server: it takes requests as they come, and sends answers as they are made.

One thread, so that nobody waits for the interpreter: what the shard can answer at once is answered here, requests that
are there together are lined up together, and the shard's turns are taken here while nobody else wants them. Nothing on
it waits for one client.
"""

import logging
import os
import select
import threading
import time
from collections import deque
from typing import Any

from mempool.errors import InvalidRequest, MempoolError
from mempool.server.lines.answering import Answering, OnLoop, detail_of
from mempool.server.lines.room import Room
from mempool.server.lines.serving import Serving
from mempool.wire.lines.framing import COPIED, MOST_REQUEST_BYTES, REQUEST, Message
from mempool.wire.lines.line import Body

_LOG = logging.getLogger("mempool.server")
STALLED_S = 30.0
"""For the rest of a message to come, or to be taken."""
_LOOK_S = 1.0
_GONE = select.EPOLLHUP | select.EPOLLRDHUP | select.EPOLLERR if hasattr(select, "EPOLLRDHUP") else 0


class Lines:
    """Lines, from ``add`` to their ends.

    Args:
        answering: Answers their calls.
        name: Of the thread.
        bodies_bytes: Of requests that are coming or being answered; who finds no room waits.
        answers_bytes: Of answers that clients have not taken yet; the line of one that finds no room ends.
    """

    def __init__(self, answering: Answering, *, name: str, bodies_bytes: int, answers_bytes: int) -> None:
        self._answering = answering
        self._name = name
        self._room = Room(bodies_bytes, MOST_REQUEST_BYTES)
        self._answers_room = Room(answers_bytes, MOST_REQUEST_BYTES)
        self._held_up: dict[Serving, None] = {}  # in the order in which they came
        self._has_more_room = False
        self._epoll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._bell, select.EPOLLIN)
        self._known: dict[int, Serving] = {}  # by descriptor
        self._coming: deque[Serving] = deque()
        self._told: deque[tuple[Serving, Message, Any, BaseException | None]] = deque()
        self._asked: list[tuple[Serving, Message, Body]] = []
        self._num_quiet = 0
        self._stalled: set[Serving] = set()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()  # of the bell, and of the end
        self._ending = self._ended = False

    @property
    def servings(self) -> tuple[Serving, ...]:
        """Lines that have not ended. Of any thread: those that come are known before they are taken out of line."""
        coming = (*self._coming.copy(),)
        return tuple(dict.fromkeys((*coming, *self._known.copy().values())))

    @property
    def is_busy(self) -> bool:
        """Whether a call is under way."""
        return any(serving.asked is not None or serving.line.is_sending for serving in self.servings)

    def add(self, serving: Serving) -> None:
        """Serve a line too. Raises RuntimeError where there is no thread for it."""
        with self._lock:
            if self._ending:
                raise RuntimeError("lines are served no more")
            self._coming.append(serving)
        if self._thread is None:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            try:
                thread.start()
            except RuntimeError:
                self._coming.remove(serving)
                raise
            self._thread = thread
        self._ring()

    def end(self) -> None:
        """End all lines, whatever they are at, and the thread."""
        self._ending = True
        if self._thread is None:
            self._close()
        else:
            self._ring()

    @property
    def ended(self) -> bool:
        """Whether that has happened."""
        return self._ended

    def _ring(self) -> None:
        with self._lock:  # the number of a descriptor that is closed may be another's
            if not self._ended:
                os.eventfd_write(self._bell, 1)

    # On the thread

    def _run(self) -> None:
        import torch

        try:
            with torch.no_grad():
                while not self._ending:
                    self._round()
        except Exception:
            _LOG.exception("lines are served no more")
        finally:
            self._close()

    def _round(self) -> None:
        for descriptor, event in self._epoll.poll(self._patience_s()):
            if descriptor == self._bell:
                os.eventfd_read(self._bell)
            elif (serving := self._known.get(descriptor)) is not None:
                self._happened(serving, event)
        while self._coming:
            self._admit(self._coming[0])
            self._coming.popleft()
        self._begin_asked()
        if self._num_quiet and not self._answering.take_turn():
            self._hand_over()
        while self._told:
            self._answer(*self._told.popleft())
        if self._has_more_room:
            self._let_in_held_up()
        if self._stalled:
            self._end_stalled()

    def _patience_s(self) -> float | None:
        """How long nothing is to be done unasked."""
        if self._num_quiet or self._asked or self._told or self._has_more_room:
            return 0.0
        return _LOOK_S if self._stalled else None

    def _admit(self, serving: Serving) -> None:
        descriptor = serving.line.fileno()
        try:
            self._epoll.register(descriptor, select.EPOLLIN | select.EPOLLRDHUP)
        except OSError as error:  # the user has as many as he may have
            _LOG.warning("the line of %s has ended: %s", serving.peer, error)
            self._end(serving)
        else:
            self._known[descriptor] = serving

    def _happened(self, serving: Serving, event: int) -> None:
        if serving.asked is None and not serving.line.is_sending and serving not in self._held_up:
            self._take(serving)
        elif event & _GONE:  # nobody waits for the answer
            self._end(serving)
        elif event & select.EPOLLOUT:
            self._flush(serving)
        else:  # what comes behind a request waits until that is answered
            self._pause(serving, select.EPOLLRDHUP)

    def _take(self, serving: Serving) -> None:
        """What is there, up to a request."""
        try:
            while (came := self._taken(serving)) is not None:
                message, body = came
                if message.kind == REQUEST:
                    serving.asked = message
                    self._asked.append((serving, message, body))
                    break
                if message.kind != COPIED:
                    raise InvalidRequest(f"a message of kind {message.kind} is none that a client sends")
                if not serving.line.give_back(message.call):  # many of them would hold up all others
                    raise InvalidRequest(f"call {message.call} has no body in shared memory")
                if not serving.line.has_rest:
                    break
            if serving.line.wanted_bytes and serving not in self._held_up:
                self._held_up[serving] = None
                self._pause(serving, select.EPOLLRDHUP)
        except (OSError, InvalidRequest):  # it is gone, or no client of ours
            self._end(serving)
        except Exception:
            _LOG.exception("the line of %s has ended", serving.peer)
            self._end(serving)
        else:
            self._look(serving)

    def _begin_asked(self) -> None:
        asked, self._asked = self._asked, []
        alone = len(asked) == 1 and not self._num_quiet
        for serving, message, body in asked:
            if serving.closed:
                continue
            try:
                reply = self._answering.begin(serving, message, body, alone=alone, told=self._tell)
            except Exception as error:
                self._answer(serving, message, None, error)
                continue
            if reply is not None:
                self._answer(serving, message, reply, None)
            elif serving.is_quiet:
                self._num_quiet += 1

    def _tell(self, serving: Serving, reply: Any, error: BaseException | None) -> None:
        """Of any thread."""
        message = serving.asked
        if message is None:  # it has ended
            return
        self._told.append((serving, message, reply, error))
        if threading.current_thread() is not self._thread:
            self._ring()

    def _hand_over(self) -> None:
        for serving in self._known.values():
            serving.is_quiet = False
        self._num_quiet = 0
        self._answering.hand_over()

    def _answer(self, serving: Serving, message: Message, reply: Any, error: BaseException | None) -> None:
        self._loud(serving)
        if serving.closed or serving.asked is not message:
            return
        if isinstance(reply, OnLoop):
            reply.begin()
            return
        try:
            if error is None:
                try:
                    sent = serving.reply(self._answering.parts(message, reply))
                except MempoolError as refused:
                    sent = serving.fail(detail_of(refused, _named(message, serving)))
            else:
                sent = serving.fail(detail_of(error, _named(message, serving)))
        except OSError:
            self._end(serving)
            return
        except Exception:
            _LOG.exception("the line of %s has ended", serving.peer)
            self._end(serving)
            return
        self._give_room(serving)
        if sent:
            self._go_on(serving)
            return
        num_bytes = serving.line.unsent_bytes
        if not self._answers_room.take(serving.host, num_bytes):
            _LOG.info("the line of %s has ended: too many answers are not taken", serving.peer)
            self._end(serving)
            return
        serving.answer_bytes = num_bytes
        self._pause(serving, select.EPOLLOUT | select.EPOLLRDHUP)
        self._look(serving)

    def _flush(self, serving: Serving) -> None:
        try:
            sent = serving.line.flush()
        except OSError:
            self._end(serving)
            return
        if sent:
            self._give_answers_room(serving)
            self._go_on(serving)

    def _go_on(self, serving: Serving) -> None:
        """Its call is answered: the next one."""
        self._read_on(serving)
        self._look(serving)
        if serving.line.has_rest:
            self._take(serving)

    def _look(self, serving: Serving) -> None:
        """Those that are within a message are not waited for longer than is reasonable."""
        serving.look()
        if serving.since_s is None or serving.asked is not None:
            self._stalled.discard(serving)
        else:
            self._stalled.add(serving)

    def _end_stalled(self) -> None:
        now_s = time.monotonic()
        for serving in list(self._stalled):
            if serving.since_s is not None and now_s - serving.since_s > STALLED_S:
                _LOG.info("the line of %s has ended: a message was not ended in %.0f s", serving.peer, STALLED_S)
                self._end(serving)

    def _loud(self, serving: Serving) -> None:
        if serving.is_quiet:
            serving.is_quiet = False
            self._num_quiet -= 1

    def _taken(self, serving: Serving) -> tuple[Message, Body] | None:
        """The next message, if it is here as a whole. One for whose body there is no room waits. Raises as
        ``ServedLine.take``."""
        line = serving.line
        came = line.take()
        if came is None and line.wanted_bytes and self._room.take(serving.host, line.wanted_bytes):
            serving.body_bytes += line.wanted_bytes
            line.wanted_bytes = 0
            came = line.take()
        return came

    def _give_room(self, serving: Serving) -> None:
        """Its request is over."""
        if serving.body_bytes:
            self._room.give_back(serving.host, serving.body_bytes)
            serving.body_bytes = 0
            self._has_more_room = bool(self._held_up)

    def _give_answers_room(self, serving: Serving) -> None:
        """Its answer is taken, or not wanted."""
        if serving.answer_bytes:
            self._answers_room.give_back(serving.host, serving.answer_bytes)
            serving.answer_bytes = 0

    def _let_in_held_up(self) -> None:
        self._has_more_room = False
        for serving in list(self._held_up):
            self._take(serving)
            if not serving.line.wanted_bytes and self._held_up.pop(serving, serving) is None:
                self._read_on(serving)

    def _pause(self, serving: Serving, events: int) -> None:
        """Nothing is read from it, until ``_read_on``."""
        serving.is_paused = True
        self._epoll.modify(serving.line.fileno(), events)

    def _read_on(self, serving: Serving) -> None:
        if serving.is_paused:
            serving.is_paused = False
            self._epoll.modify(serving.line.fileno(), select.EPOLLIN | select.EPOLLRDHUP)

    def _end(self, serving: Serving) -> None:
        """The line is over, and whatever its call is at."""
        if serving.closed:
            return
        serving.closed = True
        take_back, serving.take_back, serving.asked = serving.take_back, None, None
        descriptor = serving.line.fileno()
        if self._known.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)
        self._stalled.discard(serving)
        self._held_up.pop(serving, None)
        self._give_room(serving)
        self._give_answers_room(serving)
        self._loud(serving)
        serving.line.close()
        if take_back is not None:
            take_back()

    def _close(self) -> None:
        with self._lock:  # none comes any more
            self._ending = True
        for serving in self.servings:
            self._end(serving)
        self._coming.clear()
        with self._lock:
            self._ended = True
            os.close(self._bell)
        self._epoll.close()


def _named(message: Message, serving: Serving) -> str:
    return f"call {message.method} of {serving.peer}"
