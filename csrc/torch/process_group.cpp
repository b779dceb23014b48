#include "torch/process_group.h"

#include <algorithm>

namespace hxcomm::torch_glue {

using c10d::OpType;

ProcessGroup::ProcessGroup(int rank, int size, const Api* api, void* group, std::chrono::milliseconds timeout,
                           c10::intrusive_ptr<Options> options, Shrink shrink, Split split,
                           std::shared_ptr<TimedCalls> timed)
    : Backend(rank, size),
      issuer_(rank, api, group, std::move(timed)),
      timeout_(timeout),
      options_(std::move(options)),
      shrink_(std::move(shrink)),
      split_(std::move(split)) {}

c10::intrusive_ptr<c10d::Backend> ProcessGroup::shrink(const std::vector<int64_t>& excluded, int flags,
                                                       const c10::intrusive_ptr<Options>& options) {
  constexpr int kAbort = 1;  // torch.distributed.distributed_c10d.SHRINK_ABORT
  if (flags == kAbort) issuer_.api().abort(issuer_.group(), "shrink_group() was called with SHRINK_ABORT");
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

ProcessGroup::WorkPtr ProcessGroup::noted(WorkPtr work) {
  if (!coalescing_.load(std::memory_order_relaxed)) return work;
  const std::lock_guard lock(coalesced_mutex_);
  coalesced_.push_back(work);
  return work;
}

ProcessGroup::WorkPtr ProcessGroup::issue(OpType type, Tensors&& call, std::chrono::milliseconds timeout,
                                          bool async_op) {
  if (timeout == c10d::kUnsetTimeout) timeout = timeout_;
  if (async_op) {
    std::vector<Tensors> calls;
    calls.push_back(std::move(call));
    return issue(type, std::move(calls), timeout, async_op);
  }
  issuer_.carry_out(call, timeout);
  return noted(c10::make_intrusive<Work>(getRank(), type, call.outputs()));
}

ProcessGroup::WorkPtr ProcessGroup::issue(OpType type, std::vector<Tensors> calls, std::chrono::milliseconds timeout,
                                          bool async_op) {
  if (timeout == c10d::kUnsetTimeout) timeout = timeout_;
  return noted(issuer_.issue(type, std::move(calls), timeout, async_op));
}

ProcessGroup::WorkPtr ProcessGroup::allreduce(List& tensors, const c10d::AllreduceOptions& options) {
  if (tensors.size() == 1 && tensors[0].defined() && tensors[0].is_sparse()) return allreduce_sparse(tensors, options);
  Tensors call(kAllReduce, "all_reduce");
  fill_all_reduce(call, only(tensors, call), options.reduceOp);
  return issue(OpType::ALLREDUCE, std::move(call), options.timeout, options.asyncOp);
}

ProcessGroup::WorkPtr ProcessGroup::broadcast(List& tensors, const c10d::BroadcastOptions& options) {
  Tensors call(kBroadcast, "broadcast");
  fill_broadcast(call, only(tensors, call), options.rootRank, self());
  return issue(OpType::BROADCAST, std::move(call), options.timeout, options.asyncOp);
}

ProcessGroup::WorkPtr ProcessGroup::reduce(List& tensors, const c10d::ReduceOptions& options) {
  Tensors call(kReduce, "reduce");
  fill_reduce(call, only(tensors, call), options.rootRank, options.reduceOp, self());
  return issue(OpType::REDUCE, std::move(call), options.timeout, options.asyncOp);
}

ProcessGroup::WorkPtr ProcessGroup::allgather(std::vector<List>& outputs, List& inputs,
                                              const c10d::AllgatherOptions& options) {
  Tensors call(kAllGather, "all_gather");
  const at::Tensor& input = only(inputs, call);
  fill_all_gather(call, only(outputs, call), input, self());
  return issue(OpType::ALLGATHER, std::move(call), options.timeout, options.asyncOp);
}

ProcessGroup::WorkPtr ProcessGroup::_allgather_base(at::Tensor& output, at::Tensor& input,
                                                    const c10d::AllgatherOptions& options) {
  Tensors call(kAllGather, "all_gather_into_tensor");
  fill_all_gather(call, output, input, self());
  return issue(OpType::_ALLGATHER_BASE, std::move(call), options.timeout, options.asyncOp);
}

ProcessGroup::WorkPtr ProcessGroup::gather(std::vector<List>& outputs, List& inputs,
                                           const c10d::GatherOptions& options) {
  Tensors call(kGather, "gather");
  const at::Tensor& input = only(inputs, call);
  fill_gather(call, outputs.empty() ? nullptr : &only(outputs, call), input, options.rootRank, self());
  return issue(OpType::GATHER, std::move(call), options.timeout, options.asyncOp);
}

ProcessGroup::WorkPtr ProcessGroup::scatter(List& outputs, std::vector<List>& inputs,
                                            const c10d::ScatterOptions& options) {
  Tensors call(kScatter, "scatter");
  const at::Tensor& output = only(outputs, call);
  fill_scatter(call, output, inputs.empty() ? nullptr : &only(inputs, call), options.rootRank, self());
  return issue(OpType::SCATTER, std::move(call), options.timeout, options.asyncOp);
}

ProcessGroup::WorkPtr ProcessGroup::reduce_scatter(List& outputs, std::vector<List>& inputs,
                                                   const c10d::ReduceScatterOptions& options) {
  Tensors call(kReduceScatter, "reduce_scatter");
  const at::Tensor& output = only(outputs, call);
  fill_reduce_scatter(call, output, only(inputs, call), options.reduceOp, self());
  return issue(OpType::REDUCE_SCATTER, std::move(call), options.timeout, options.asyncOp);
}

ProcessGroup::WorkPtr ProcessGroup::_reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                                                         const c10d::ReduceScatterOptions& options) {
  Tensors call(kReduceScatter, "reduce_scatter_tensor");
  fill_reduce_scatter(call, output, input, options.reduceOp, self());
  return issue(OpType::_REDUCE_SCATTER_BASE, std::move(call), options.timeout, options.asyncOp);
}

ProcessGroup::WorkPtr ProcessGroup::alltoall_base(at::Tensor& output, at::Tensor& input,
                                                  std::vector<int64_t>& output_splits,
                                                  std::vector<int64_t>& input_splits,
                                                  const c10d::AllToAllOptions& options) {
  Tensors call(kAllToAll, "all_to_all_single");
  fill_all_to_all(call, output, input, output_splits, input_splits, self());
  return issue(OpType::ALLTOALL_BASE, std::move(call), options.timeout, options.asyncOp);
}

ProcessGroup::WorkPtr ProcessGroup::alltoall(List& outputs, List& inputs, const c10d::AllToAllOptions& options) {
  Tensors call(kAllToAll, "all_to_all");
  fill_all_to_all(call, outputs, inputs, self());
  return issue(OpType::ALLTOALL, std::move(call), options.timeout, options.asyncOp);
}

ProcessGroup::WorkPtr ProcessGroup::barrier(const c10d::BarrierOptions& options) {
  return issue(OpType::BARRIER, Tensors(kBarrier, "barrier"), options.timeout, options.asyncOp);
}

}  // namespace hxcomm::torch_glue
