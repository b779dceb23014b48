// A backend that does nothing: what torch.distributed itself costs per call, for the benchmark.
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <string>
#include <vector>

namespace hxcomm::torch_glue {

// Every collective returns a completed Work at once; no tensor is read or written, so every result is wrong.
class NothingProcessGroup final : public c10d::Backend {
 public:
  NothingProcessGroup(int rank, int size) : Backend(rank, size) {}

  const std::string getBackendName() const override { return "hxcomm_nothing"; }

  using WorkPtr = c10::intrusive_ptr<c10d::Work>;
  using List = std::vector<at::Tensor>;
  WorkPtr allreduce(List& tensors, const c10d::AllreduceOptions& options) override;
  WorkPtr broadcast(List& tensors, const c10d::BroadcastOptions& options) override;
  WorkPtr _allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) override;
  WorkPtr _reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                               const c10d::ReduceScatterOptions& options) override;
  WorkPtr barrier(const c10d::BarrierOptions& options) override;
};

}  // namespace hxcomm::torch_glue
