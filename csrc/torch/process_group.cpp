#include "torch/process_group.h"

#include "torch/errors.h"
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

}  // namespace

ProcessGroup::ProcessGroup(int rank, int size, const Api* api, void* group, std::chrono::milliseconds timeout)
    : Backend(rank, size), api_(api), group_(api->retain(group)), timeout_(timeout) {}

ProcessGroup::~ProcessGroup() {
  api_->leave(group_);
  api_->release(group_);
}

void ProcessGroup::refuse_problem(Tensors& tensors, std::chrono::milliseconds timeout) {
  if (tensors.problem().empty()) return;
  const ApiCall call = tensors.call(timeout);
  api_->refuse(group_, &call, tensors.problem().c_str());
  throw_typed(6, tensors.problem());
}

void ProcessGroup::run(Tensors& tensors, std::chrono::milliseconds timeout) {
  const ApiCall call = tensors.call(timeout);
  if (const int kind = api_->run(group_, &call); kind != 0) throw_typed(kind, api_->message());
  tensors.copy_back();
}

ProcessGroup::WorkPtr ProcessGroup::issue(OpType type, Tensors&& call, std::chrono::milliseconds timeout,
                                          bool async_op) {
  if (timeout == c10d::kUnsetTimeout) timeout = timeout_;
  if (async_op) {
    std::vector<Tensors> calls;
    calls.push_back(std::move(call));
    return issue(type, std::move(calls), timeout, async_op);
  }
  refuse_problem(call, timeout);
  run(call, timeout);
  return c10::make_intrusive<Work>(getRank(), type, call.outputs());
}

ProcessGroup::WorkPtr ProcessGroup::issue(OpType type, std::vector<Tensors> calls, std::chrono::milliseconds timeout,
                                          bool async_op) {
  if (timeout == c10d::kUnsetTimeout) timeout = timeout_;
  for (Tensors& tensors : calls) refuse_problem(tensors, timeout);
  if (async_op) {
    auto work = c10::make_intrusive<Work>(getRank(), type, api_, group_, std::move(calls));
    work->post(timeout);
    return work;
  }
  std::vector<at::Tensor> results;
  for (Tensors& tensors : calls) {
    run(tensors, timeout);
    for (const at::Tensor& tensor : tensors.outputs()) results.push_back(tensor);
  }
  return c10::make_intrusive<Work>(getRank(), type, std::move(results));
}

ProcessGroup::WorkPtr ProcessGroup::allreduce(List& tensors, const c10d::AllreduceOptions& options) {
  Tensors call(kAllReduce, "all_reduce");
  const at::Tensor& tensor = only(tensors, call);
  call.add_in_place(tensor, /*written=*/true);
  call.set_reduce_op(options.reduceOp, *api_);
  call.require_count(tensor.defined() ? tensor.numel() : 0);
  return issue(OpType::ALLREDUCE, std::move(call), options.timeout, options.asyncOp);
}

ProcessGroup::WorkPtr ProcessGroup::broadcast(List& tensors, const c10d::BroadcastOptions& options) {
  Tensors call(kBroadcast, "broadcast");
  const at::Tensor& tensor = only(tensors, call);
  call.set_root(options.rootRank, getSize());
  call.add_in_place(tensor, /*written=*/options.rootRank != getRank());
  call.require_count(tensor.defined() ? tensor.numel() : 0);
  return issue(OpType::BROADCAST, std::move(call), options.timeout, options.asyncOp);
}

ProcessGroup::WorkPtr ProcessGroup::reduce(List& tensors, const c10d::ReduceOptions& options) {
  Tensors call(kReduce, "reduce");
  const at::Tensor& tensor = only(tensors, call);
  call.set_root(options.rootRank, getSize());
  call.add_in_place(tensor, /*written=*/options.rootRank == getRank());
  call.set_reduce_op(options.reduceOp, *api_);
  call.require_count(tensor.defined() ? tensor.numel() : 0);
  return issue(OpType::REDUCE, std::move(call), options.timeout, options.asyncOp);
}

void ProcessGroup::add_one_per_rank(Tensors& call, const List& tensors, bool output) const {
  if (tensors.size() != static_cast<size_t>(getSize()))
    return call.fail("a list of " + std::to_string(tensors.size()) + " tensors, but the group has " +
                     std::to_string(getSize()) + " ranks");
  for (const at::Tensor& tensor : tensors) output ? call.add_output(tensor) : call.add_input(tensor);
}

ProcessGroup::WorkPtr ProcessGroup::allgather(std::vector<List>& outputs, List& inputs,
                                              const c10d::AllgatherOptions& options) {
  Tensors call(kAllGather, "all_gather");
  const at::Tensor& input = only(inputs, call);
  call.add_input(input);
  add_one_per_rank(call, only(outputs, call), /*output=*/true);
  call.require_count(input.defined() ? input.numel() : 0);
  return issue(OpType::ALLGATHER, std::move(call), options.timeout, options.asyncOp);
}

Tensors ProcessGroup::all_gather_call(const at::Tensor& output, const at::Tensor& input) const {
  Tensors call(kAllGather, "all_gather_into_tensor");
  call.add_input(input);
  call.add_output(output, getSize());
  call.require_count(input.defined() ? input.numel() : 0);
  return call;
}

ProcessGroup::WorkPtr ProcessGroup::_allgather_base(at::Tensor& output, at::Tensor& input,
                                                    const c10d::AllgatherOptions& options) {
  return issue(OpType::_ALLGATHER_BASE, all_gather_call(output, input), options.timeout, options.asyncOp);
}

ProcessGroup::WorkPtr ProcessGroup::allgather_into_tensor_coalesced(List& outputs, List& inputs,
                                                                    const c10d::AllgatherOptions& options) {
  std::vector<Tensors> calls;
  if (outputs.size() != inputs.size())
    calls.emplace_back(kAllGather, "all_gather_into_tensor")
        .fail(std::to_string(outputs.size()) + " outputs for " + std::to_string(inputs.size()) + " inputs");
  else
    for (size_t i = 0; i < inputs.size(); ++i) calls.push_back(all_gather_call(outputs[i], inputs[i]));
  return issue(OpType::COALESCED, std::move(calls), options.timeout, options.asyncOp);
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
  call.require_count(input.defined() ? input.numel() : 0);
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
  call.require_count(output.defined() ? output.numel() : 0);
  return issue(OpType::SCATTER, std::move(call), options.timeout, options.asyncOp);
}

ProcessGroup::WorkPtr ProcessGroup::reduce_scatter(List& outputs, std::vector<List>& inputs,
                                                   const c10d::ReduceScatterOptions& options) {
  Tensors call(kReduceScatter, "reduce_scatter");
  const at::Tensor& output = only(outputs, call);
  call.add_output(output);
  add_one_per_rank(call, only(inputs, call), /*output=*/false);
  call.set_reduce_op(options.reduceOp, *api_);
  call.require_count(output.defined() ? output.numel() : 0);
  return issue(OpType::REDUCE_SCATTER, std::move(call), options.timeout, options.asyncOp);
}

Tensors ProcessGroup::reduce_scatter_call(const at::Tensor& output, const at::Tensor& input,
                                          const c10d::ReduceOp& op) const {
  Tensors call(kReduceScatter, "reduce_scatter_tensor");
  call.add_output(output);
  call.add_input(input, getSize());
  call.set_reduce_op(op, *api_);
  call.require_count(output.defined() ? output.numel() : 0);
  return call;
}

ProcessGroup::WorkPtr ProcessGroup::_reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                                                         const c10d::ReduceScatterOptions& options) {
  return issue(OpType::_REDUCE_SCATTER_BASE, reduce_scatter_call(output, input, options.reduceOp), options.timeout,
               options.asyncOp);
}

ProcessGroup::WorkPtr ProcessGroup::reduce_scatter_tensor_coalesced(List& outputs, List& inputs,
                                                                    const c10d::ReduceScatterOptions& options) {
  std::vector<Tensors> calls;
  if (outputs.size() != inputs.size())
    calls.emplace_back(kReduceScatter, "reduce_scatter_tensor")
        .fail(std::to_string(outputs.size()) + " outputs for " + std::to_string(inputs.size()) + " inputs");
  else
    for (size_t i = 0; i < inputs.size(); ++i)
      calls.push_back(reduce_scatter_call(outputs[i], inputs[i], options.reduceOp));
  return issue(OpType::COALESCED, std::move(calls), options.timeout, options.asyncOp);
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

ProcessGroup::WorkPtr ProcessGroup::barrier(const c10d::BarrierOptions& options) {
  return issue(OpType::BARRIER, Tensors(kBarrier, "barrier"), options.timeout, options.asyncOp);
}

}  // namespace hxcomm::torch_glue
