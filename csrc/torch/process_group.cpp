#include "torch/process_group.h"

#include <algorithm>

#include "torch/errors.h"
#include "torch/event.h"
#include "torch/work.h"

namespace hxcomm::torch_glue {
namespace {

using c10d::OpType;

// c10d passes lists from the time of one process with many GPUs; a process has one tensor here.
const at::Tensor& only(const std::vector<at::Tensor>& tensors, Tensors& call) {
  static const at::Tensor undefined;
  if (tensors.size() == 1) return tensors[0];
  call.fail("takes one tensor per process, not " + std::to_string(tensors.size()));
  return undefined;
}

const std::vector<at::Tensor>& only(const std::vector<std::vector<at::Tensor>>& lists, Tensors& call) {
  static const std::vector<at::Tensor> empty;
  if (lists.size() == 1) return lists[0];
  call.fail("takes one list of tensors per process, not " + std::to_string(lists.size()));
  return empty;
}

int64_t elements_of(const at::Tensor& tensor) { return tensor.defined() ? tensor.numel() : 0; }

bool all_equal(const std::vector<at::Tensor>& tensors) {
  return std::all_of(tensors.begin(), tensors.end(),
                     [&](const auto& each) { return elements_of(each) == elements_of(tensors[0]); });
}

Event begin_event_of(c10::ArrayRef<Tensors> calls) {
  return begin_event(calls[0].name(), [calls] {
    std::vector<c10::IValue> shown;
    for (const Tensors& call : calls) shown.insert(shown.end(), call.shown().begin(), call.shown().end());
    return shown;
  });
}

}  // namespace

ProcessGroup::ProcessGroup(int rank, int size, const Api* api, void* group, std::chrono::milliseconds timeout,
                           c10::intrusive_ptr<Options> options, Shrink shrink, Split split)
    : Backend(rank, size),
      api_(api),
      group_(api->retain(group)),
      timeout_(timeout),
      options_(std::move(options)),
      shrink_(std::move(shrink)),
      split_(std::move(split)) {}

ProcessGroup::~ProcessGroup() {
  api_->leave(group_);
  api_->release(group_);
}

c10::intrusive_ptr<c10d::Backend> ProcessGroup::shrink(const std::vector<int64_t>& excluded, int flags,
                                                       const c10::intrusive_ptr<Options>& options) {
  constexpr int kAbort = 1;  // torch.distributed.distributed_c10d.SHRINK_ABORT
  if (flags == kAbort) api_->abort(group_, "shrink_group() was called with SHRINK_ABORT");
  return shrink_(excluded, options);
}

c10::intrusive_ptr<c10d::Backend> ProcessGroup::split(const c10::intrusive_ptr<c10d::Store>& store,
                                                      const std::vector<int>& ranks,
                                                      const c10::intrusive_ptr<Options>& options) {
  if (std::find(ranks.begin(), ranks.end(), getRank()) == ranks.end()) return nullptr;
  // torch asks once for each device, cpu and hx: one group serves both.
  if (auto made = last_split_.lock(); made && options->group_name == last_split_name_) return made;
  auto made = split_(store, ranks, options);
  last_split_ = c10::weak_intrusive_ptr<Backend>(made);
  last_split_name_ = options->group_name;
  return made;
}

void ProcessGroup::refuse_problems(c10::ArrayRef<Tensors> calls, std::chrono::milliseconds timeout) {
  const auto bad =
      std::find_if(calls.begin(), calls.end(), [](const Tensors& call) { return !call.problem().empty(); });
  if (bad == calls.end()) return;
  for (const Tensors& each : calls) {
    const ApiCall call = each.call(timeout);
    api_->refuse(group_, &call, bad->problem().c_str());
  }
  throw_typed(ErrorKind::usage, bad->problem());
}

void ProcessGroup::run(Tensors& tensors, std::chrono::milliseconds timeout) {
  const ApiCall call = tensors.call(timeout);
  if (const int kind = api_->run(group_, &call); kind != 0) {
    const std::string message = api_->message();
    keep_if_peers_may_touch(*api_, group_, kind, {&tensors, 1});
    throw_typed(kind, message);
  }
  tensors.copy_back();
}

ProcessGroup::WorkPtr ProcessGroup::noted(WorkPtr work) {
  if (!coalescing_.load(std::memory_order_relaxed)) return work;
  const std::lock_guard lock(coalesced_mutex_);
  coalesced_.push_back(work);
  return work;
}

ProcessGroup::WorkPtr ProcessGroup::start(c10::intrusive_ptr<Work> work, std::chrono::milliseconds timeout,
                                          bool async_op) {
  work->post(timeout);
  if (!async_op) work->wait(kNoTimeout);
  return noted(std::move(work));
}

ProcessGroup::WorkPtr ProcessGroup::issue(OpType type, Tensors&& call, std::chrono::milliseconds timeout,
                                          bool async_op) {
  if (timeout == c10d::kUnsetTimeout) timeout = timeout_;
  if (async_op) {
    std::vector<Tensors> calls;
    calls.push_back(std::move(call));
    return issue(type, std::move(calls), timeout, async_op);
  }
  const Event event = begin_event_of(call);
  refuse_problems(call, timeout);
  run(call, timeout);
  return noted(c10::make_intrusive<Work>(getRank(), type, call.outputs()));
}

ProcessGroup::WorkPtr ProcessGroup::issue(OpType type, std::vector<Tensors> calls, std::chrono::milliseconds timeout,
                                          bool async_op) {
  if (calls.empty()) return noted(c10::make_intrusive<Work>(getRank(), type, List{}));
  if (timeout == c10d::kUnsetTimeout) timeout = timeout_;
  const Event event = begin_event_of(calls);
  refuse_problems(calls, timeout);
  auto work = c10::make_intrusive<Work>(getRank(), type, api_, group_, std::move(calls));
  work->set_event(event);
  return start(std::move(work), timeout, async_op);
}

void ProcessGroup::fill_all_reduce(Tensors& call, const at::Tensor& tensor, const c10d::ReduceOp& op) {
  call.add_in_place(tensor, /*written=*/true);
  call.set_reduce_op(op);
  call.require_count(elements_of(tensor));
}

ProcessGroup::WorkPtr ProcessGroup::allreduce(List& tensors, const c10d::AllreduceOptions& options) {
  if (tensors.size() == 1 && tensors[0].defined() && tensors[0].is_sparse()) return allreduce_sparse(tensors, options);
  Tensors call(kAllReduce, "all_reduce");
  fill_all_reduce(call, only(tensors, call), options.reduceOp);
  return issue(OpType::ALLREDUCE, std::move(call), options.timeout, options.asyncOp);
}

ProcessGroup::WorkPtr ProcessGroup::broadcast(List& tensors, const c10d::BroadcastOptions& options) {
  Tensors call(kBroadcast, "broadcast");
  const at::Tensor& tensor = only(tensors, call);
  call.set_root(options.rootRank, getSize());
  call.add_in_place(tensor, /*written=*/options.rootRank != getRank());
  call.require_count(elements_of(tensor));
  return issue(OpType::BROADCAST, std::move(call), options.timeout, options.asyncOp);
}

ProcessGroup::WorkPtr ProcessGroup::reduce(List& tensors, const c10d::ReduceOptions& options) {
  Tensors call(kReduce, "reduce");
  const at::Tensor& tensor = only(tensors, call);
  call.set_root(options.rootRank, getSize());
  call.add_in_place(tensor, /*written=*/options.rootRank == getRank());
  call.set_reduce_op(options.reduceOp);
  call.require_count(elements_of(tensor));
  return issue(OpType::REDUCE, std::move(call), options.timeout, options.asyncOp);
}

void ProcessGroup::add_one_per_rank(Tensors& call, const List& tensors, bool output) const {
  if (tensors.size() != static_cast<size_t>(getSize()))
    return call.fail("a list of " + std::to_string(tensors.size()) + " tensors, but the group has " +
                     std::to_string(getSize()) + " ranks");
  for (const at::Tensor& tensor : tensors) output ? call.add_output(tensor) : call.add_input(tensor);
}

void ProcessGroup::fill_all_gather(Tensors& call, const List& outputs, const at::Tensor& input) const {
  if (all_equal(outputs)) {
    call.add_input(input);
    add_one_per_rank(call, outputs, /*output=*/true);
    call.require_count(elements_of(input));
    return;
  }
  // Where ranks contribute unequal tensors, each sends its own to everybody: an all_to_all, whose pairs may differ.
  call.make_all_to_all();
  call.add_input_for_each(input, getSize());
  add_one_per_rank(call, outputs, /*output=*/true);
  const auto own = static_cast<size_t>(getRank());
  if (own < outputs.size() && elements_of(outputs[own]) != elements_of(input))
    call.fail("this is rank " + std::to_string(own) + " with an input of " + std::to_string(elements_of(input)) +
              " elements, but output " + std::to_string(own) + " has " + std::to_string(elements_of(outputs[own])));
}

ProcessGroup::WorkPtr ProcessGroup::allgather(std::vector<List>& outputs, List& inputs,
                                              const c10d::AllgatherOptions& options) {
  Tensors call(kAllGather, "all_gather");
  const at::Tensor& input = only(inputs, call);
  fill_all_gather(call, only(outputs, call), input);
  return issue(OpType::ALLGATHER, std::move(call), options.timeout, options.asyncOp);
}

void ProcessGroup::fill_all_gather(Tensors& call, const at::Tensor& output, const at::Tensor& input) const {
  call.add_input(input);
  call.add_output(output, getSize());
  call.require_count(elements_of(input));
}

ProcessGroup::WorkPtr ProcessGroup::_allgather_base(at::Tensor& output, at::Tensor& input,
                                                    const c10d::AllgatherOptions& options) {
  Tensors call(kAllGather, "all_gather_into_tensor");
  fill_all_gather(call, output, input);
  return issue(OpType::_ALLGATHER_BASE, std::move(call), options.timeout, options.asyncOp);
}

ProcessGroup::WorkPtr ProcessGroup::gather(std::vector<List>& outputs, List& inputs,
                                           const c10d::GatherOptions& options) {
  Tensors call(kGather, "gather");
  const at::Tensor& input = only(inputs, call);
  call.set_root(options.rootRank, getSize());
  call.add_input(input);
  if (options.rootRank == getRank())
    add_one_per_rank(call, only(outputs, call), /*output=*/true);
  else if (!outputs.empty())
    call.fail("only the root takes a list of outputs");
  call.require_count(elements_of(input));
  return issue(OpType::GATHER, std::move(call), options.timeout, options.asyncOp);
}

ProcessGroup::WorkPtr ProcessGroup::scatter(List& outputs, std::vector<List>& inputs,
                                            const c10d::ScatterOptions& options) {
  Tensors call(kScatter, "scatter");
  const at::Tensor& output = only(outputs, call);
  call.set_root(options.rootRank, getSize());
  call.add_output(output);
  if (options.rootRank == getRank())
    add_one_per_rank(call, only(inputs, call), /*output=*/false);
  else if (!inputs.empty())
    call.fail("only the root takes a list of inputs");
  call.require_count(elements_of(output));
  return issue(OpType::SCATTER, std::move(call), options.timeout, options.asyncOp);
}

ProcessGroup::WorkPtr ProcessGroup::reduce_scatter(List& outputs, std::vector<List>& inputs,
                                                   const c10d::ReduceScatterOptions& options) {
  Tensors call(kReduceScatter, "reduce_scatter");
  const at::Tensor& output = only(outputs, call);
  call.add_output(output);
  const List& parts = only(inputs, call);
  add_one_per_rank(call, parts, /*output=*/false);
  call.set_reduce_op(options.reduceOp);
  // Equal parts are the common case, whose count the fingerprint holds: a rank with unequal ones is a mismatch to them.
  if (all_equal(parts)) {
    call.require_count(elements_of(output));
  } else {
    call.set_uneven();
    const auto own = static_cast<size_t>(getRank());
    if (own < parts.size() && elements_of(parts[own]) != elements_of(output))
      call.fail("this is rank " + std::to_string(own) + " with an output of " + std::to_string(elements_of(output)) +
                " elements, but input " + std::to_string(own) + " has " + std::to_string(elements_of(parts[own])));
  }
  return issue(OpType::REDUCE_SCATTER, std::move(call), options.timeout, options.asyncOp);
}

void ProcessGroup::fill_reduce_scatter(Tensors& call, const at::Tensor& output, const at::Tensor& input,
                                       const c10d::ReduceOp& op) const {
  call.add_output(output);
  call.add_input(input, getSize());
  call.set_reduce_op(op);
  call.require_count(elements_of(output));
}

ProcessGroup::WorkPtr ProcessGroup::_reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                                                         const c10d::ReduceScatterOptions& options) {
  Tensors call(kReduceScatter, "reduce_scatter_tensor");
  fill_reduce_scatter(call, output, input, options.reduceOp);
  return issue(OpType::_REDUCE_SCATTER_BASE, std::move(call), options.timeout, options.asyncOp);
}

ProcessGroup::WorkPtr ProcessGroup::alltoall_base(at::Tensor& output, at::Tensor& input,
                                                  std::vector<int64_t>& output_splits,
                                                  std::vector<int64_t>& input_splits,
                                                  const c10d::AllToAllOptions& options) {
  Tensors call(kAllToAll, "all_to_all_single");
  // One rank may give splits where another leaves them out, so equal and unequal splits are one op: counts are
  // compared pair by pair.
  const auto rows = [&](const std::vector<int64_t>& splits, const at::Tensor& tensor) {
    if (!splits.empty() && splits.size() != static_cast<size_t>(getSize()))
      call.fail(std::to_string(splits.size()) + " split sizes, but the group has " + std::to_string(getSize()) +
                " ranks");
    if (!splits.empty() || !tensor.defined()) return splits;
    const int64_t first = tensor.dim() == 0 ? 1 : tensor.size(0);
    if (first % getSize() != 0)
      call.fail("a first dimension of " + std::to_string(first) + " is not divisible by " + std::to_string(getSize()) +
                " ranks, and no split sizes were given");
    return std::vector<int64_t>(static_cast<size_t>(getSize()), first / getSize());
  };
  call.add_input_rows(input, rows(input_splits, input));
  call.add_output_rows(output, rows(output_splits, output));
  call.set_uneven();
  return issue(OpType::ALLTOALL_BASE, std::move(call), options.timeout, options.asyncOp);
}

ProcessGroup::WorkPtr ProcessGroup::alltoall(List& outputs, List& inputs, const c10d::AllToAllOptions& options) {
  Tensors call(kAllToAll, "all_to_all");
  add_one_per_rank(call, inputs, /*output=*/false);
  add_one_per_rank(call, outputs, /*output=*/true);
  call.set_uneven();
  return issue(OpType::ALLTOALL, std::move(call), options.timeout, options.asyncOp);
}

ProcessGroup::WorkPtr ProcessGroup::barrier(const c10d::BarrierOptions& options) {
  return issue(OpType::BARRIER, Tensors(kBarrier, "barrier"), options.timeout, options.asyncOp);
}

}  // namespace hxcomm::torch_glue
