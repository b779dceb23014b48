#include "torch/issuer.h"

#include <algorithm>
#include <optional>

#include "torch/errors.h"
#include "torch/event.h"

namespace hxcomm::torch_glue {
namespace {

Event begin_event_of(c10::ArrayRef<Tensors> calls) {
  return begin_event(calls[0].name(), [calls] {
    std::vector<c10::IValue> shown;
    for (const Tensors& call : calls) shown.insert(shown.end(), call.shown().begin(), call.shown().end());
    return shown;
  });
}

}  // namespace

Issuer::~Issuer() {
  if (timed_ && Py_IsInitialized() != 0) try {
      // A wait that asks Python may hold the lock.
      std::optional<py::gil_scoped_release> no_gil;
      if (PyGILState_Check() != 0) no_gil.emplace();
      timed_->settle(*api_, group_);
    } catch (const std::exception& error) {
      TORCH_WARN("collectives that nobody waited for were not timed: ", error.what());
    }
  api_->leave(group_);
  api_->release(group_);
}

void Issuer::refuse_problems(c10::ArrayRef<Tensors> calls, std::chrono::milliseconds timeout) {
  const auto bad =
      std::find_if(calls.begin(), calls.end(), [](const Tensors& call) { return !call.problem().empty(); });
  if (bad == calls.end()) return;
  for (const Tensors& each : calls) {
    const ApiCall call = each.call(timeout);
    api_->refuse(group_, &call, bad->problem().c_str());
  }
  throw_typed(ErrorKind::usage, bad->problem());
}

void Issuer::run(Tensors& tensors, std::chrono::milliseconds timeout) {
  ApiCall call = tensors.call(timeout);
  const uint64_t ticket = timed_ ? timed_->begin(call) : 0;
  if (const int kind = api_->run(group_, &call); kind != 0) {
    const std::string message = api_->message();
    keep_if_peers_may_touch(*api_, group_, kind, {&tensors, 1});
    throw_typed(kind, message);
  }
  if (ticket != 0) timed_->end(*api_, group_, ticket);
  tensors.copy_back();
}

void Issuer::carry_out(Tensors& call, std::chrono::milliseconds timeout) {
  const Event event = begin_event_of(call);
  refuse_problems(call, timeout);
  run(call, timeout);
}

c10::intrusive_ptr<Work> Issuer::issue(c10d::OpType type, std::vector<Tensors> calls, std::chrono::milliseconds timeout,
                                       bool async_op) {
  if (calls.empty()) return c10::make_intrusive<Work>(rank_, type, std::vector<at::Tensor>{});
  const Event event = begin_event_of(calls);
  refuse_problems(calls, timeout);
  auto work = c10::make_intrusive<Work>(rank_, type, api_, group_, timed_, std::move(calls));
  work->set_event(event);
  work->post(timeout);
  if (!async_op) work->wait(kNoTimeout);
  return work;
}

}  // namespace hxcomm::torch_glue
