// c10d's handle of a collective that was started.
#pragma once

#include <torch/csrc/distributed/c10d/Work.hpp>

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "communicator/api.h"
#include "torch/event.h"
#include "torch/tensors.h"
#include "torch/timed_calls.h"

namespace hxcomm::torch_glue {

// Of calls that have ended with an error of that kind: peers may still read and write hx tensors, so their memory is
// not used again until every peer has left the group or is dead.
void keep_if_peers_may_touch(const Api& api, void* group, int kind, c10::ArrayRef<Tensors> calls) noexcept;

// Several calls may stand behind one Work (coalesced ops). The Work may be dropped early: the calls hold it until they
// have ended, and with it the tensors.
class Work final : public c10d::Work {
 public:
  // The handle of calls that have ended well.
  Work(int rank, c10d::OpType type, std::vector<at::Tensor> results);
  // The handle of `calls` calls that will be posted. `timed`: null where no chip is simulated.
  Work(int rank, c10d::OpType type, const Api* api, void* group, std::shared_ptr<TimedCalls> timed,
       std::vector<Tensors> calls);
  ~Work() override;

  // What remains to be done when all calls have ended well, before the Work has; and what it then yields. Before
  // post().
  void set_finish(std::vector<at::Tensor> results, std::function<void()> finish);
  void set_event(Event event);                   // ends with the last call; before post()
  void post(std::chrono::milliseconds timeout);  // throws what posting throws

  bool isCompleted() override;
  bool isSuccess() const override;
  std::exception_ptr exception() const override;
  // Blocks; drives the group. A timeout that runs out aborts the group. kNoTimeout: the deadline of the op itself.
  // Returns, or throws, when no call uses its tensors any more.
  bool wait(std::chrono::milliseconds timeout) override;
  void synchronize() override { wait(kNoTimeout); }
  void abort() override;
  std::vector<at::Tensor> result() override { return results_; }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;
  int sourceRank() const override;  // of a recv that has ended
  uint64_t getSequencenumber() const override { return sequence_; }

 private:
  struct Context;
  void call_ended(int kind, const char* message);
  void store_results();
  void rethrow() const;
  void advance_clock();

  const Api* api_ = nullptr;
  void* group_ = nullptr;
  std::shared_ptr<TimedCalls> timed_;
  std::vector<uint64_t> tickets_;  // of calls whose end the virtual clock has not been set to
  std::vector<Tensors> calls_;
  std::function<void()> finish_;
  std::vector<at::Tensor> results_;
  std::vector<void*> ops_;
  c10::intrusive_ptr<c10::ivalue::Future> future_;
  uint64_t sequence_ = 0;
  std::atomic<int> running_{0};
  std::atomic<bool> ended_{false};
  mutable std::mutex error_mutex_;
  int error_kind_ = 0;
  std::string error_message_;
};

// Several Works as one: what torch's coalescing manager gets for all that was started inside it.
class JoinedWork final : public c10d::Work {
 public:
  JoinedWork(int rank, std::vector<c10::intrusive_ptr<c10d::Work>> works)
      : c10d::Work(rank, c10d::OpType::COALESCED), works_(std::move(works)) {}

  bool isCompleted() override;
  bool isSuccess() const override;
  std::exception_ptr exception() const override;  // the first one's
  bool wait(std::chrono::milliseconds timeout) override;
  void synchronize() override { wait(kNoTimeout); }
  void abort() override;
  std::vector<at::Tensor> result() override;
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;  // of result()

 private:
  std::vector<c10::intrusive_ptr<c10d::Work>> works_;
};

}  // namespace hxcomm::torch_glue
