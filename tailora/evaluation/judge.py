"""A language model as judge: a server compares the answers of the base and of the tuned model, in both orders.

    answers -> two requests for each prompt -> verdicts, in verdicts.jsonl -> judge_facts: what influenced the verdicts

The score of the tuned answer is the mean of both verdicts: 1 if it won, .5 for a tie. The base has .5, so that the
change of the score is the win rate minus .5. A prompt without both verdicts has no score.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from threading import Event
from time import monotonic
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import ArrayLike

from tailora.data.messages import text_of
from tailora.errors import ConfigError, ServerError, WriteError
from tailora.formats.io import wrap_os_error
from tailora.formats.run_folder import VERDICTS
from tailora.train.answers import ComparedAnswer, Question
from tailora.train.config import JUDGE, TrainConfig
from tailora.train.significance import MOST_MISSING, Interval, t_975

if TYPE_CHECKING:
    from httpx import Client

KEYS = ("TAILORA_JUDGE_KEY", "OPENAI_API_KEY")  # environment variables
AT_ONCE, TRIES, SECONDS, FIRST_WAIT = 4, 3, 120.0, 1.0  # requests; of each: tries, time limit, seconds to the next try
LEAST_FAILED = 8  # requests without a verdict, before the judge is given up
MOST_BYTES = 2**22  # of a reply
THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
VERDICT = re.compile(r"\[\[(A|B|tie)\]\]", re.IGNORECASE)
COMPLETE = "complete"
TRIAL = "What is two plus two?", "Five.", "Four.", "Four."
WORD = re.compile(r"\W*(A|B|tie)\W*", re.IGNORECASE)  # a reply without anything else
PLACEHOLDER = re.compile(r"\{(prompt|answer_a|answer_b|reference)\}")
PROMPT = """Which of two answers to a prompt is better? Judge whether they are right and helpful, not how long they are.

<prompt>
{prompt}
</prompt>
<answer A>
{answer_a}
</answer A>
<answer B>
{answer_b}
</answer B>

End your reply with [[A]] if answer A is better, [[B]] if answer B is better, or [[tie]]."""


class Judge:
    """config: has a metric judge:URL. Raises ConfigError for an invalid address, prompt or key."""

    def __init__(self, config: TrainConfig, note: Callable[[str], None]) -> None:
        self.url, self.model, self.note = _endpoint(config.judges[0]), config.judge_model, note
        self.template = PROMPT if config.judge_prompt is None else _template(Path(config.judge_prompt))
        self.cache = Path(config.output_dir) / VERDICTS
        self.counts = Counter[str]()  # of requests, tries without a verdict by their problem, and cached verdicts
        self._problem = ""
        self._key = next((os.environ[name] for name in KEYS if os.environ.get(name)), "")
        if not (self._key.isascii() and self._key.isprintable()):
            raise ConfigError(f"{' or '.join(KEYS)} contains a line break or an invalid character; set it again")

    def check(self) -> None:
        """Asks the judge about one pair of answers. Raises ServerError if it has no verdict."""
        if self._read().get(self._state) == COMPLETE:
            return
        self.note(f"{self._name}: one request now, to see that it answers, and two for each held-out prompt at the end")
        with self._client() as client:
            verdict, _ = self._ask(client, self._request(*TRIAL), Event())
        if verdict is None:
            raise ServerError(f"{self._name} has no verdict: {self._problem}; check the address, the model and the key")

    def compare(
        self, answers: Sequence[ComparedAnswer], questions: Sequence[Question], progress: Callable[[int, int], None]
    ) -> list[ComparedAnswer]:
        """Returns the answers with the verdicts and scores of held-out prompts. Equal answers are a tie.

        Stops once the share of failed requests leaves no verdict about the run.
        """
        requests = dict[int, list[str]]()  # row -> the request with the tuned answer as A, and as B
        for row, (answer, question) in enumerate(zip(answers, questions, strict=True)):
            if not question.is_training and answer.before is not None and answer.base != answer.tuned:
                pairs = (answer.tuned, answer.base), (answer.base, answer.tuned)
                requests[row] = [self._request(_text(question), *pair, answer.reference) for pair in pairs]
        keys = {text: self._hash(text) for texts in requests.values() for text in texts}
        verdicts = self._read()
        missing = {key: text for text, key in keys.items() if key not in verdicts}
        self.counts["cached"] = len(keys) - len(missing)
        cached = f"; {len(keys) - len(missing):,} verdicts are in {self.cache}" if len(missing) < len(keys) else ""
        self.note(f"{self._name}: sending {len(missing):,} requests with prompts and answers{cached}")
        try:
            self._send(missing, verdicts, max(LEAST_FAILED, MOST_MISSING * len(keys)), progress)
        except WriteError as error:  # the verdicts so far count
            self._problem = str(error)
        judged, wins = list(answers), ({"A": 1.0, "B": 0.0, "tie": 0.5}, {"A": 0.0, "B": 1.0, "tie": 0.5})
        for row, answer in enumerate(answers):
            if questions[row].is_training or answer.before is None or answer.after is None:
                continue
            texts = requests.get(row)
            both = [w.get(verdicts.get(keys[t], "")) for w, t in zip(wins, texts, strict=True)] if texts else [0.5, 0.5]
            score = None if both[0] is None or both[1] is None else (both[0] + both[1]) / 2
            before = replace(answer.before, scores={**answer.before.scores, JUDGE: 0.5})
            after = replace(answer.after, scores={**answer.after.scores, JUDGE: score})
            judged[row] = replace(answer, before=before, after=after, judged=tuple(both))
        if unjudged := sum(key not in verdicts for key in keys.values()):
            self.counts["unjudged"] = unjudged
            self.note(f"{self._name}: {unjudged:,} requests have no verdict. The last problem: {self._problem}")
        return judged

    @property
    def _state(self) -> str:
        """The key in the file of verdicts that says whether any was missing when this judge was last asked."""
        return self._hash(self._request(*TRIAL))

    @property
    def _name(self) -> str:
        return f"judge {self.model} at {self.url}"

    def _request(self, prompt: str, first: str, second: str, reference: str) -> str:
        values = {"prompt": prompt, "answer_a": first, "answer_b": second, "reference": reference}
        return PLACEHOLDER.sub(lambda match: values[match[1]], self.template)

    def _hash(self, request: str) -> str:
        return sha256(json.dumps([self.url, self.model, request]).encode()).hexdigest()

    def _read(self) -> dict[str, str]:
        with wrap_os_error(self.cache):
            lines = self.cache.read_text("utf-8").splitlines() if self.cache.exists() else []
        verdicts = dict[str, str]()
        for line in lines:
            with suppress(ValueError, LookupError, TypeError):  # a killed run may end within a line
                row = json.loads(line)
                verdicts[row["request"]] = row["verdict"]
        return verdicts

    def _send(
        self,
        missing: Mapping[str, str],
        verdicts: dict[str, str],
        most_failed: float,
        progress: Callable[[int, int], None],
    ) -> None:
        """Adds each verdict to `verdicts` and to the file as soon as it arrives."""
        if not missing:
            return
        failed = done = 0
        stopped = Event()
        with (
            self._client() as client,
            ThreadPoolExecutor(AT_ONCE) as pool,
            wrap_os_error(self.cache),
            _opened(self.cache) as f,
        ):

            def write(key: str, verdict: str) -> None:
                f.write(json.dumps({"request": key, "verdict": verdict}) + "\n")
                f.flush()

            f.write("\n" * (self.cache.stat().st_size > 0))  # after a line that a killed run has not finished
            write(self._state, "incomplete")
            waiting: dict[Future[tuple[str | None, Counter[str]]], str] = {
                pool.submit(self._ask, client, text, stopped): key for key, text in missing.items()
            }
            try:
                while waiting and failed <= most_failed:
                    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                        key, (verdict, counts) = waiting.pop(future), future.result()
                        self.counts.update(counts)
                        done, failed = done + 1, failed + (verdict is None)
                        if verdict is not None:
                            verdicts[key] = verdict
                            write(key, verdict)
                        progress(done, len(missing))
            finally:
                stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
            if all(key in verdicts for key in missing):
                write(self._state, COMPLETE)

    def _ask(self, client: "Client", request: str, stopped: Event) -> tuple[str | None, Counter[str]]:
        """Returns the verdict, None if no try has one, and counts of requests and problems."""
        import httpx

        counts = Counter[str]()
        for number in range(TRIES):
            if stopped.wait(FIRST_WAIT * 2 ** (number - 1) if number else 0):
                break
            counts["requests"] += 1
            try:
                # Some models refuse a temperature, and the same one might only repeat a malformed verdict
                status, content = self._post(client, request, {} if number else {"temperature": 0})
            except httpx.TimeoutException:
                problem, text = "timeouts", f"no reply within {SECONDS:g} seconds"
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                problem, text = "refusals", f"{error or type(error).__name__}"
            else:
                verdict = None if status != 200 else _verdict(content)
                if verdict is not None:
                    return verdict, counts
                problem, text = ("malformed", "its reply") if status == 200 else ("refusals", f"status {status}")
                text += f" {content.decode(errors='replace')}"
            counts[problem] += 1
            self._problem = (text.replace(self._key, "***") if self._key else text)[:200]  # servers may repeat the key
        return None, counts

    def _client(self) -> "Client":
        import httpx

        trusts = urlsplit(self.url).hostname not in THIS_MACHINE  # a proxy of the environment
        return httpx.Client(timeout=SECONDS, trust_env=trusts)  # follows no redirect, which would get the key

    def _post(self, client: "Client", request: str, more: Mapping[str, Any]) -> tuple[int, bytes]:
        import httpx

        body = {"model": self.model, "messages": [{"role": "user", "content": request}], **more}
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self._key}"} if self._key else {}
        end, content = monotonic() + SECONDS, b""
        with client.stream("POST", self.url, content=json.dumps(body), headers=headers) as response:
            for part in response.iter_bytes():
                content += part
                if monotonic() > end or len(content) > MOST_BYTES:
                    raise httpx.ReadTimeout("the reply does not end")
        return response.status_code, content


def _opened(cache: Path) -> IO[str]:
    cache.parent.mkdir(parents=True, exist_ok=True)
    return cache.open("a")


def _endpoint(url: str) -> str:
    """Returns the address of chat completions: URL/v1/chat/completions, or below the path of the URL if it has one."""
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # an invalid port
        is_valid = False
    if not is_valid:
        raise ConfigError(f"--metric judge:{url}: expected an address such as judge:http://127.0.0.1:8000/v1")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(f"--metric judge: the address has a password or a query; set the key as {KEYS[0]}")
    path = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
    return f"{parts.scheme}://{parts.netloc}{path}/chat/completions"


def _template(path: Path) -> str:
    try:
        template = path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--judge-prompt {path} cannot be read: {error}") from None
    needed = [f"{{{name}}}" for name in ("prompt", "answer_a", "answer_b") if f"{{{name}}}" not in template]
    if needed:
        raise ConfigError(f"--judge-prompt {path} has no {' and no '.join(needed)}; add it where the text should be")
    return template


def _text(question: Question) -> str:
    if isinstance(question.value, str):
        return question.value
    if [message["role"] for message in question.value] == ["user"]:
        return text_of(question.value[0])
    calls = [json.dumps(message["tool_calls"]) if message.get("tool_calls") else "" for message in question.value]
    return "\n\n".join(f"{m['role']}: {text_of(m)}{call}" for m, call in zip(question.value, calls, strict=True))


def _verdict(content: bytes) -> str | None:
    """Returns A, B or tie of a reply of the server; None if it has none."""
    try:
        text = json.loads(content)["choices"][0]["message"]["content"]
        marks = VERDICT.findall(text) or ([match[1]] if (match := WORD.fullmatch(text)) else [])
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return {"a": "A", "b": "B", "tie": "tie"}[marks[-1].lower()] if marks else None


# ---- What influenced the verdicts


@dataclass(frozen=True)
class JudgeFacts:
    """Influences on the verdicts; None if they are unknown."""

    order_changed: float | None  # share of verdicts that changed with the order
    at_equal_length: Interval | None  # the win rate

    def to_dict(self) -> dict[str, Any]:
        rate = self.at_equal_length
        return {
            "order_changed": self.order_changed,
            "win_rate_at_equal_length": None if rate is None else rate._asdict(),
        }


def judge_facts(answers: Sequence[ComparedAnswer]) -> JudgeFacts:
    complete = [answer for answer in answers if len(answer.judged) == 2 and None not in answer.judged]
    changed = [answer.judged[0] != answer.judged[1] for answer in complete if answer.base != answer.tuned]
    wins = [sum(win or 0.0 for win in answer.judged) / 2 for answer in complete]
    longer = [len(answer.tuned) - len(answer.base) for answer in complete]
    rate = win_rate_at_equal_length(wins, longer, [answer.cluster for answer in complete])
    return JudgeFacts(float(np.mean(changed)) if changed else None, rate)


def win_rate_at_equal_length(
    wins: ArrayLike, differences: ArrayLike, clusters: ArrayLike, ridge: float = 0.01
) -> Interval | None:
    """Returns P(win) at difference 0 by the length term of AlpacaEval 2 (Dubois et al. 2024, arXiv:2404.04475).

    logit P(win) = a + b tanh(difference / sd), by Newton's method. The 95% interval uses the sandwich estimator of
    the error of a, over clusters (Liang and Zeger, Biometrika 73, 1986).
    wins: 0 to 1; differences of lengths, tuned - base.
    ridge: times (a^2 + b^2) / 2, keeps them finite if the length alone decides.
    None if all answers of one model are longer, which leaves equal length to the prior; or with a single cluster.
    """
    y, longer = np.asarray(wins, dtype=np.float64), np.asarray(differences, dtype=np.float64)
    _, owners = np.unique(np.asarray(clusters), return_inverse=True)
    count = owners.max(initial=-1) + 1
    if count < 2 or (longer > 0).all() or (longer < 0).all():
        return None
    X = np.stack([np.ones_like(longer), np.tanh(longer / (longer.std() or 1.0))], axis=1)  # (answers, 2)

    def objective(w: Any) -> float:
        return float(np.logaddexp(0, X @ w).sum() - y @ (X @ w) + ridge * (w @ w) / 2)

    def hessian(w: Any) -> Any:
        p = _sigmoid(X @ w)
        return (X.T * (p * (1 - p))) @ X + ridge * np.eye(2)

    w = np.zeros(2)
    for _ in range(100):
        step = np.linalg.solve(hessian(w), X.T @ (y - _sigmoid(X @ w)) - ridge * w)
        while objective(w + step) > objective(w) and np.abs(step).max() > 1e-10:
            step = step / 2
        w = w + step
        if np.abs(step).max() < 1e-10:
            break
    sums = np.zeros((count, 2))
    np.add.at(sums, owners, X * (y - _sigmoid(X @ w))[:, None])
    inverse = np.linalg.inv(hessian(w))
    variance = count / (count - 1) * (inverse @ sums.T @ sums @ inverse)[0, 0]
    half = t_975(int(count) - 1) * float(np.sqrt(variance))
    return Interval(*(float(_sigmoid(end)) for end in (w[0], w[0] - half, w[0] + half)))


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))
