// backend="hxcomm" for torch.distributed: turns tensors into calls of the communicator, and its errors into Python's.
//
// Knows torch and the communicator's table of functions; nothing of algorithms, transports or shared memory.
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <atomic>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

#include "communicator/api.h"
#include "torch/calls.h"
#include "torch/issuer.h"

namespace hxcomm::torch_glue {

class ProcessGroup final : public c10d::Backend {
 public:
  // Makes the process group of all ranks but the excluded ones (in order), with options or null.
  using Shrink = std::function<c10::intrusive_ptr<Backend>(const std::vector<int64_t>& excluded,
                                                           const c10::intrusive_ptr<Options>& options)>;

  // Makes the process group of `ranks` of this one, this rank among them.
  using Split = std::function<c10::intrusive_ptr<Backend>(const c10::intrusive_ptr<c10d::Store>& store,
                                                          const std::vector<int>& ranks,
                                                          const c10::intrusive_ptr<Options>& options)>;

  // `api` and `group` come from the capsules of hxcomm._core; the group is retained. `timed`: null where no chip is
  // simulated.
  ProcessGroup(int rank, int size, const Api* api, void* group, std::chrono::milliseconds timeout,
               c10::intrusive_ptr<Options> options, Shrink shrink, Split split, std::shared_ptr<TimedCalls> timed);

  const std::string getBackendName() const override { return "hxcomm"; }
  void setTimeout(std::chrono::milliseconds timeout) override { timeout_ = timeout; }
  void setSequenceNumberForGroup() override {}  // the group counts from its creation on
  uint64_t getSequenceNumberForGroup() override { return issuer_.api().sequence(issuer_.group()); }
  void abort() override { issuer_.api().abort(issuer_.group(), "abort() was called"); }
  void shutdown() override { issuer_.api().leave(issuer_.group()); }
  bool supportsShrinking() const override { return true; }
  // Blocks until all that remain have called it. torch then destroys this one; what is pending here raises then, or
  // with SHRINK_ABORT at once.
  c10::intrusive_ptr<Backend> shrink(const std::vector<int64_t>& excluded, int flags,
                                     const c10::intrusive_ptr<Options>& options) override;

  bool supportsSplitting() const override { return true; }
  c10::intrusive_ptr<Options> getBackendOptions() override { return options_; }
  // Null on ranks that are not among `ranks`: they have nothing to do. Blocks until all that are have called it.
  c10::intrusive_ptr<Backend> split(const c10::intrusive_ptr<c10d::Store>& store, const std::vector<int>& ranks,
                                    const c10::intrusive_ptr<Options>& options) override;

  using WorkPtr = c10::intrusive_ptr<c10d::Work>;
  WorkPtr broadcast(List& tensors, const c10d::BroadcastOptions& options) override;
  WorkPtr allreduce(List& tensors, const c10d::AllreduceOptions& options) override;
  WorkPtr allreduce_coalesced(List& tensors, const c10d::AllreduceCoalescedOptions& options) override;
  // SUM of COO tensors of one size. Blocks until every rank has called it, also when async: how many elements each rank
  // has decides what is exchanged.
  WorkPtr allreduce_sparse(List& tensors, const c10d::AllreduceOptions& options) override;
  WorkPtr reduce(List& tensors, const c10d::ReduceOptions& options) override;
  WorkPtr allgather(std::vector<List>& outputs, List& inputs, const c10d::AllgatherOptions& options) override;
  WorkPtr allgather_coalesced(std::vector<List>& outputs, List& inputs, const c10d::AllgatherOptions& options) override;
  WorkPtr _allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) override;
  WorkPtr allgather_into_tensor_coalesced(List& outputs, List& inputs, const c10d::AllgatherOptions& options) override;
  WorkPtr gather(std::vector<List>& outputs, List& inputs, const c10d::GatherOptions& options) override;
  WorkPtr scatter(List& outputs, std::vector<List>& inputs, const c10d::ScatterOptions& options) override;
  WorkPtr reduce_scatter(List& outputs, std::vector<List>& inputs, const c10d::ReduceScatterOptions& options) override;
  WorkPtr _reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                               const c10d::ReduceScatterOptions& options) override;
  WorkPtr reduce_scatter_tensor_coalesced(List& outputs, List& inputs,
                                          const c10d::ReduceScatterOptions& options) override;
  WorkPtr alltoall_base(at::Tensor& output, at::Tensor& input, std::vector<int64_t>& output_splits,
                        std::vector<int64_t>& input_splits, const c10d::AllToAllOptions& options) override;
  WorkPtr alltoall(List& outputs, List& inputs, const c10d::AllToAllOptions& options) override;
  WorkPtr barrier(const c10d::BarrierOptions& options) override;
  // Blocks. Throws CommTimeoutError naming the ranks that did not come in time (the first one, or all of them).
  void monitoredBarrier(const c10d::BarrierOptions& options, bool wait_all_ranks) override;
  WorkPtr send(List& tensors, int to, int tag) override;
  WorkPtr recv(List& tensors, int from, int tag) override;
  WorkPtr recvAnysource(List& tensors, int tag) override;

  Issuer& issuer() { return issuer_; }
  std::chrono::milliseconds timeout() const { return timeout_; }

  // Between the two, every collective begins at once as it would anyway; endCoalescing() returns one handle for all.
  void startCoalescing() override;
  WorkPtr endCoalescing() override;

 private:
  Member self() const { return {getRank(), getSize()}; }
  // Runs the calls now (sync) or posts them. A timeout that is not set becomes that of the group.
  WorkPtr issue(c10d::OpType type, std::vector<Tensors> calls, std::chrono::milliseconds timeout, bool async_op);
  WorkPtr issue(c10d::OpType type, Tensors&& call, std::chrono::milliseconds timeout, bool async_op);
  WorkPtr noted(WorkPtr work);  // for endCoalescing()

  Issuer issuer_;
  std::chrono::milliseconds timeout_;
  c10::intrusive_ptr<Options> options_;
  Shrink shrink_;
  Split split_;
  c10::weak_intrusive_ptr<Backend> last_split_{c10::intrusive_ptr<Backend>()};
  std::string last_split_name_;
  std::atomic<bool> coalescing_{false};
  std::mutex coalesced_mutex_;
  std::vector<WorkPtr> coalesced_;  // since startCoalescing()
};

}  // namespace hxcomm::torch_glue
