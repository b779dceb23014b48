// torch's autograd starts a thread for each device at the first backward of a process, and never again. A program that
// ran one on the CPU before it touched hx (which is made at its first use) would then have none for hx.
#include <torch/csrc/autograd/engine.h>

#include <memory>
#include <thread>
#include <vector>

#include "torch/device/runtime.h"

namespace hxcomm::device {
namespace {

using torch::autograd::Engine;
using torch::autograd::ReadyQueue;

// A derived class may name protected members.
struct Threads : Engine {
  static constexpr auto queues() { return &Threads::device_ready_queues_; }
  static constexpr auto pool() { return &Threads::thread_pool_shared_; }
};

}  // namespace

bool start_autograd(int chips) {
  Engine& engine = Engine::get_default_engine();
  const bool started = (engine.*Threads::pool()) != nullptr;
  auto& queues = engine.*Threads::queues();
  if (!started || !queues.empty()) return false;
  // As Engine::start_device_threads() does. Nobody reads the queues of devices before there is a tensor on one.
  std::vector<std::shared_ptr<ReadyQueue>> made(static_cast<size_t>(chips));
  for (auto& queue : made) queue = std::make_shared<ReadyQueue>();
  queues = made;
  for (int chip = 0; chip < chips; ++chip)
    std::thread(&Engine::thread_init, &engine, chip, made[static_cast<size_t>(chip)], true).detach();
  return true;
}

}  // namespace hxcomm::device
