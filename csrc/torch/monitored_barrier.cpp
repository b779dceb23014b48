// A barrier with a timeout of its own, whose error names the ranks that did not come.
#include "torch/errors.h"
#include "torch/process_group.h"

namespace hxcomm::torch_glue {
namespace {

std::string seconds(std::chrono::milliseconds time) { return std::to_string(1e-3 * static_cast<double>(time.count())); }

}  // namespace

void ProcessGroup::monitoredBarrier(const c10d::BarrierOptions& options, bool wait_all_ranks) {
  const auto timeout = options.timeout == c10d::kUnsetTimeout ? timeout_ : options.timeout;
  // The peers' other calls give up after the group's timeout: longer, and they would end the group first.
  if (timeout.count() <= 0 || timeout > timeout_)
    throw_typed(ErrorKind::usage, "monitored_barrier: a timeout of " + seconds(timeout) +
                                      " s; it must be positive and at most that of the group, " + seconds(timeout_) +
                                      " s");
  ApiCall call = Tensors(kBarrier, "barrier").call(timeout);
  call.name_first = wait_all_ranks ? 0 : 1;
  if (const int kind = issuer_.api().run(issuer_.group(), &call); kind != 0) throw_typed(kind, issuer_.api().message());
}

}  // namespace hxcomm::torch_glue
