// Hands calls of one group to the communicator, for every front end.
#pragma once

#include <chrono>
#include <memory>
#include <vector>

#include "communicator/api.h"
#include "torch/timed_calls.h"
#include "torch/work.h"

namespace hxcomm::torch_glue {

class Issuer {
 public:
  // `api` and `group` come from the capsules of hxcomm._core; the group is retained, and left when this is destroyed.
  // `timed`: null where no chip is simulated.
  Issuer(int rank, const Api* api, void* group, std::shared_ptr<TimedCalls> timed)
      : rank_(rank), api_(api), group_(api->retain(group)), timed_(std::move(timed)) {}
  ~Issuer();
  Issuer(const Issuer&) = delete;
  Issuer& operator=(const Issuer&) = delete;

  const Api& api() const { return *api_; }
  void* group() const { return group_; }

  // A call with a problem is refused: the peers are told, this rank raises. Of several, all are.
  void refuse_problems(c10::ArrayRef<Tensors> calls, std::chrono::milliseconds timeout);
  void run(Tensors& call, std::chrono::milliseconds timeout);  // blocks until it has ended
  // run(), seen by the profiler and after a look for problems.
  void carry_out(Tensors& call, std::chrono::milliseconds timeout);
  // Posts the calls, and where `async_op` is false waits for them. One Work for all of them.
  c10::intrusive_ptr<Work> issue(c10d::OpType type, std::vector<Tensors> calls, std::chrono::milliseconds timeout,
                                 bool async_op);

 private:
  int rank_;
  const Api* api_;
  void* group_;
  std::shared_ptr<TimedCalls> timed_;
};

}  // namespace hxcomm::torch_glue
