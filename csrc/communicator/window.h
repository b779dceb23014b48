// A window: one tensor of each rank of a group that all its ranks may put into. What is known of it on one rank.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "communicator/call.h"
#include "core/signal.h"

namespace hxcomm {

// What a rank brings to a window.
struct WindowRequest {
  DType dtype = DType::uint8;
  DeviceKind device = DeviceKind::cpu;
  std::byte* data = nullptr;
  uint64_t count = 0;  // elements
  Shape shape;
  std::string problem;  // not empty: the front end refuses its tensor, and only tells the peers so
  int64_t timeout_ns = 0;
};

// This rank's own part, as frames of other hosts may touch it: what they say is checked, whoever sends them.
class WindowMemory {
 public:
  void open(std::byte* data, uint64_t nbytes);
  // Once it returns, nothing is stored any more.
  void close();
  // What is wrong with it, and then nothing was stored; or "". A window that is closed takes nothing, and says nothing.
  std::string store(uint64_t offset_bytes, const std::byte* data, size_t nbytes);

 private:
  std::mutex mutex_;
  std::byte* data_ = nullptr;
  uint64_t nbytes_ = 0;
};

struct Window {
  struct Part {                   // of one rank
    std::byte* memory = nullptr;  // null: on another host
    uint64_t count = 0;
    Shape shape;
    const SignalLine* signals = nullptr;  // to this rank
    uint64_t awaited = 0;                 // signals that waits have been posted for
    uint64_t framed = 0;                  // frames sent to it
    std::atomic<uint64_t> taken{0};       // frames of it that have been carried out here
  };
  explicit Window(size_t world_size) : parts(world_size) {}

  uint64_t id = 0;  // equal on every rank
  DType dtype = DType::uint8;
  DeviceKind device = DeviceKind::cpu;
  std::vector<Part> parts;                 // by rank; what changes in them, but `taken`, is under OneSided::mutex_
  SignalLine* own_signals = nullptr;       // by destination, in this rank's segment
  uint64_t own_signals_offset = 0;         // there; 0: none
  std::unique_ptr<SignalLine[]> mirrored;  // by source: signals of ranks of other hosts
  WindowMemory memory;
  std::atomic<int> copying{0};  // puts of this rank that are being copied
  bool closing = false;         // takes no more calls; under OneSided::mutex_

  // Of a rank of another host.
  bool is_remote(int rank) const {
    return mirrored != nullptr && parts[static_cast<size_t>(rank)].signals == &mirrored[rank];
  }
};

}  // namespace hxcomm
