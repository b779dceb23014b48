#include "torch/nothing.h"

#include "torch/work.h"

namespace hxcomm::torch_glue {

using c10d::OpType;

NothingProcessGroup::WorkPtr NothingProcessGroup::allreduce(List& tensors, const c10d::AllreduceOptions&) {
  return c10::make_intrusive<Work>(getRank(), OpType::ALLREDUCE, tensors);
}

NothingProcessGroup::WorkPtr NothingProcessGroup::broadcast(List& tensors, const c10d::BroadcastOptions&) {
  return c10::make_intrusive<Work>(getRank(), OpType::BROADCAST, tensors);
}

NothingProcessGroup::WorkPtr NothingProcessGroup::_allgather_base(at::Tensor& output, at::Tensor&,
                                                                  const c10d::AllgatherOptions&) {
  return c10::make_intrusive<Work>(getRank(), OpType::_ALLGATHER_BASE, List{output});
}

NothingProcessGroup::WorkPtr NothingProcessGroup::_reduce_scatter_base(at::Tensor& output, at::Tensor&,
                                                                       const c10d::ReduceScatterOptions&) {
  return c10::make_intrusive<Work>(getRank(), OpType::_REDUCE_SCATTER_BASE, List{output});
}

NothingProcessGroup::WorkPtr NothingProcessGroup::barrier(const c10d::BarrierOptions&) {
  return c10::make_intrusive<Work>(getRank(), OpType::BARRIER, List{});
}

}  // namespace hxcomm::torch_glue
