"""vLLM's scheduler, with a fast path for steps in which every sequence decodes.

Where many sequences of a small model decode, a step is host-bound, and most of it is vLLM's
scheduler: for every sequence and step it looks for features that our requests never use (encoder
inputs, drafts, connectors, logprobs), searches for pages where the last one has room, and makes an
output that nobody reads. Steps with prompts or preemption are scheduled by vLLM; the tokens of all
steps are read here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
from vllm.v1.core.sched.utils import check_stop, remove_all
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus


class DecodeScheduler(AsyncScheduler):
    """Makes the decisions of its base class, whether vLLM steps asynchronously (CUDA) or not (CPU).

    `update_from_output` returns nothing: the engine calls `take_finished`.
    """

    running: list[Request]
    requests: dict[str, Request]
    finished_req_ids: set[str]
    reset_preempted_req_ids: set[str]
    prev_step_scheduled_req_ids: set[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        others = [self.connector, self.ec_connector, self.aux_output_connector, self.lora_config]
        plain = not any(others) and not self.num_spec_tokens and not self.use_v2_model_runner
        assert plain, "connectors, adapters, drafts and the second runner are not supported"
        managers = self.kv_cache_manager.coordinator.single_type_managers
        assert [type(m) for m in managers] == [FullAttentionManager], (
            "layers differ in their KV cache"
        )
        self.page_size = managers[0].block_size
        self.finished: list[Request] = []
        self.stops: Callable[[Sequence[int], int], bool] | None = None  # of all requests

    def take_finished(self) -> list[Request]:
        """The requests that have finished since the last call, in the order of their ends."""
        finished, self.finished = self.finished, []
        return finished

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        if self._all_decode():
            return self._schedule_decodes()
        return super().schedule(throttle_prefills)

    def _all_decode(self) -> bool:
        """True if no request can be admitted or is amid its prompt, and enough pages are free."""
        room = len(self.running) < self.max_num_active_reqs
        if (room and (self.waiting or self.kv_holding_waiting)) or self._inflight_prefills:
            return False
        need = sum(request.num_computed_tokens % self.page_size == 0 for request in self.running)
        fits = len(self.running) <= self.max_num_scheduled_tokens
        return fits and need <= self.kv_cache_manager.block_pool.get_num_free_blocks()

    def _schedule_decodes(self) -> SchedulerOutput:
        """Schedule as the base class does where each running sequence computes its newest token.

        All of them were in the step before: sequences that decode come first, so that none was left
        out for lack of room.
        """
        self.current_step += 1
        self.kv_cache_manager.new_step_starts()
        scheduled: dict[str, int] = {}
        data = CachedRequestData.make_empty()
        for request in self.running:
            computed, in_flight = request.num_computed_tokens, request.num_output_placeholders
            most = request.num_prompt_tokens + request.max_tokens
            if (
                in_flight and computed + 2 - in_flight >= most
            ) or computed + 1 >= self.max_model_len:
                continue  # its last token is being drawn
            name = request.request_id
            scheduled[name] = 1
            data.new_block_ids.append(self._new_page(request))
            data.num_computed_tokens.append(computed)
            data.num_output_tokens.append(request.num_output_tokens + in_flight)
            request.num_computed_tokens = computed + 1
            request.num_in_flight_tokens += 1
            request.num_output_placeholders = in_flight + 1
        data.req_ids.extend(scheduled)
        self.prev_step_scheduled_req_ids = set(scheduled)
        output = SchedulerOutput(
            scheduled_new_reqs=[],
            scheduled_cached_reqs=data,
            num_scheduled_tokens=scheduled,
            total_num_scheduled_tokens=len(scheduled),
            scheduled_spec_decode_tokens={},
            scheduled_encoder_inputs={},
            preempted_req_ids=self.reset_preempted_req_ids,
            finished_req_ids=self.finished_req_ids,
            free_encoder_mm_hashes=[],
            new_block_ids_to_zero=self._get_new_block_ids_to_zero(),
        )
        self.finished_req_ids, self.reset_preempted_req_ids = set(), set()
        return output

    def _new_page(self, request: Request) -> tuple[list[int], ...] | None:
        """A page for the next token, if that is the first of one."""
        if request.num_computed_tokens % self.page_size:
            return None
        pages = self.kv_cache_manager.allocate_slots(request, 1)
        assert pages is not None, "a page was free"
        return pages.get_block_ids(allow_none=True)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, Any]:
        """Append the tokens that a step has drawn, and free the requests that they finish."""
        tokens, rows = model_runner_output.sampled_token_ids, model_runner_output.req_id_to_index
        ended: set[Request] = set()
        ended_waiting: set[Request] = set()
        for name, count in scheduler_output.num_scheduled_tokens.items():
            request = self.requests.get(name)
            if request is None:
                continue  # it finished in the step before, when this one was already in flight
            request.num_in_flight_tokens -= count
            stale = request.num_stale_output_tokens > 0  # it was preempted since
            if stale:
                request.num_stale_output_tokens -= count
            drawn = tokens[rows[name]] if tokens else []
            if not drawn:
                continue  # amid its prompt
            running = request.status == RequestStatus.RUNNING
            self._append(request, drawn[0], stale)
            if self._is_stopped(request) or check_stop(request, self.max_model_len):
                self._free_request(request)
                self.finished.append(request)
                (ended if running else ended_waiting).add(request)
        if ended:
            self.running = remove_all(self.running, ended)
        if ended_waiting:
            self.waiting.remove_requests(ended_waiting)
        return {}

    def _is_stopped(self, request: Request) -> bool:
        """True if its last token completes a stop string, which comes before its longest length."""
        if self.stops is None or not self.stops(request.output_token_ids, 0):
            return False
        request.status = RequestStatus.FINISHED_STOPPED
        return True

    def _append(self, request: Request, token: int, stale: bool) -> None:
        """Append a token, and cache the page that it has filled for the prefix cache."""
        request.append_output_token_ids(token)
        if not stale:
            request.num_output_placeholders -= 1
        known = request.num_computed_tokens - request.num_output_placeholders
        if known % self.page_size == 0:
            self.kv_cache_manager.cache_blocks(request, known)
