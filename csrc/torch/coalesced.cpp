// Collectives of the process group that take several tensors at a time, and torch's coalescing manager.
#include "torch/process_group.h"
#include "torch/work.h"

namespace hxcomm::torch_glue {
namespace {

using c10d::OpType;

// One call that refuses two lists of different lengths.
std::vector<Tensors> unequal(Op op, const char* name, size_t outputs, size_t inputs) {
  std::vector<Tensors> calls;
  calls.emplace_back(op, name).fail(std::to_string(outputs) + " outputs for " + std::to_string(inputs) + " inputs");
  return calls;
}

}  // namespace

ProcessGroup::WorkPtr ProcessGroup::allreduce_coalesced(List& tensors, const c10d::AllreduceCoalescedOptions& options) {
  std::vector<Tensors> calls;
  for (const at::Tensor& tensor : tensors)
    fill_all_reduce(calls.emplace_back(kAllReduce, "all_reduce_coalesced"), tensor, options.reduceOp);
  return issue(OpType::COALESCED, std::move(calls), options.timeout, options.asyncOp);
}

ProcessGroup::WorkPtr ProcessGroup::allgather_into_tensor_coalesced(List& outputs, List& inputs,
                                                                    const c10d::AllgatherOptions& options) {
  constexpr const char* kName = "all_gather_into_tensor_coalesced";
  std::vector<Tensors> calls;
  if (outputs.size() != inputs.size())
    calls = unequal(kAllGather, kName, outputs.size(), inputs.size());
  else
    for (size_t i = 0; i < inputs.size(); ++i)
      fill_all_gather(calls.emplace_back(kAllGather, kName), outputs[i], inputs[i], self());
  return issue(OpType::COALESCED, std::move(calls), options.timeout, options.asyncOp);
}

// outputs[r][i] becomes input i of rank r.
ProcessGroup::WorkPtr ProcessGroup::allgather_coalesced(std::vector<List>& outputs, List& inputs,
                                                        const c10d::AllgatherOptions& options) {
  constexpr const char* kName = "all_gather_coalesced";
  std::vector<Tensors> calls;
  for (const List& of_rank : outputs)
    if (of_rank.size() != inputs.size() && calls.empty())
      calls = unequal(kAllGather, kName, of_rank.size(), inputs.size());
  if (calls.empty())
    for (size_t i = 0; i < inputs.size(); ++i) {
      List into;
      for (const List& of_rank : outputs) into.push_back(of_rank[i]);
      fill_all_gather(calls.emplace_back(kAllGather, kName), into, inputs[i], self());
    }
  return issue(OpType::COALESCED, std::move(calls), options.timeout, options.asyncOp);
}

ProcessGroup::WorkPtr ProcessGroup::reduce_scatter_tensor_coalesced(List& outputs, List& inputs,
                                                                    const c10d::ReduceScatterOptions& options) {
  constexpr const char* kName = "reduce_scatter_tensor_coalesced";
  std::vector<Tensors> calls;
  if (outputs.size() != inputs.size())
    calls = unequal(kReduceScatter, kName, outputs.size(), inputs.size());
  else
    for (size_t i = 0; i < inputs.size(); ++i)
      fill_reduce_scatter(calls.emplace_back(kReduceScatter, kName), outputs[i], inputs[i], options.reduceOp, self());
  return issue(OpType::COALESCED, std::move(calls), options.timeout, options.asyncOp);
}

void ProcessGroup::startCoalescing() {
  const std::lock_guard lock(coalesced_mutex_);
  coalesced_.clear();  // an exception inside the manager leaves without endCoalescing()
  coalescing_.store(true);
}

ProcessGroup::WorkPtr ProcessGroup::endCoalescing() {
  const std::lock_guard lock(coalesced_mutex_);
  coalescing_.store(false);
  return c10::make_intrusive<JoinedWork>(getRank(), std::exchange(coalesced_, {}));
}

}  // namespace hxcomm::torch_glue
