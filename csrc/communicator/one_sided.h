// One-sided calls on windows: put, signal, wait_signal. Terms as in MPI's RMA and NVSHMEM.
//
// On a host a put is one copy straight into the peer's memory and a signal one word in this rank's segment that the
// peer reads; both have ended when they return. To another host they are frames, in order, as many on their way as
// there are credits; the process there carries them out as they arrive, with its background thread where it waits for
// nothing. A signal covers the puts of the same rank to the same destination before it, no others. Opening and closing
// are collective: a rank's part may be touched from before any peer can know of it until all have said that they have
// ended.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "communicator/call.h"
#include "communicator/window.h"
#include "transport/endpoint.h"

namespace hxcomm {

class Group;

// Frames of windows that a rank may have on their way to another one, and the bytes of a put that each holds: at most
// 8 MiB of one peer's puts wait in a process.
constexpr uint64_t kWindowCredits = 16;
constexpr size_t kPieceBytes = 512 << 10;

class OneSided {
 public:
  explicit OneSided(Group& group);

  // Blocks until every rank has called it, and on all of them raises or yields a window. Throws Error{usage} where this
  // rank's request has a problem, Error{mismatch} where another rank's has or the ranks do not agree, or the error that
  // ended the group.
  std::shared_ptr<Window> open(const WindowRequest& request);
  // Blocks until every rank has called it. Then no peer touches this rank's part any more. Throws as open(); after a
  // mismatch the window is as it was, after any other error it is closed here, and peers may still be storing.
  void close(const std::shared_ptr<Window>& window, int64_t timeout_ns);
  // Closes it on this rank alone: calls end with an error, and frames are dropped. Peers may still be storing.
  void forget(const std::shared_ptr<Window>& window) noexcept;

  // Takes a put, signal or wait_signal. Throws Error{usage} where it cannot be, or the error that ended the group.
  std::shared_ptr<Op> post(std::shared_ptr<Op> op);
  // Moves frames and ends waits, unless another thread is doing so. True when anything moved; ops that have ended are
  // added to `finished`.
  bool advance(std::vector<std::shared_ptr<Op>>* finished, bool look_at_clock);
  // Ends all that is pending with the error that ended the group.
  void fail_all(std::vector<std::shared_ptr<Op>>* finished);
  void forget_all();
  // Whether a put is being copied. Once false, and the group has ended, none will be.
  bool is_copying() const;

  // As Group::cross(), before the first operation.
  void cross(const std::vector<int>& hosts);
  // On the thread that pumps the wire.
  void on_frame(int source, const FrameHeader& header, const Payload& payload);

 private:
  using OpPointer = std::shared_ptr<Op>;
  using WindowPointer = std::shared_ptr<Window>;
  using Finished = std::vector<OpPointer>;
  enum class Awaits : uint8_t { signals, frames };
  struct Wait {
    OpPointer op;
    WindowPointer window;
    uint64_t value = 0;
    Awaits what = Awaits::signals;
  };
  struct Send {
    OpPointer op;
    WindowPointer window;
    uint64_t sent_bytes = 0;
  };
  struct Channel {  // to and from one rank of another host
    std::deque<Send> queue;
    uint64_t sent = 0;  // frames
    uint64_t told = 0;  // of `taken`, to the peer
    std::atomic<uint64_t> acknowledged{0};
    std::atomic<uint64_t> taken{0};
  };

  WindowPointer find(uint64_t id) const;
  WindowPointer make(WindowRequest& request);
  std::vector<std::byte> exchange(const void* mine, size_t nbytes, int64_t timeout_ns);
  void bind(Window& window, size_t rank, uint64_t offset, uint64_t count, uint64_t signals_offset,
            const int64_t* extents, size_t n_dims);
  void withdraw(const WindowPointer& window, bool peers_are_done);
  void start_closing(const WindowPointer& window, Finished* finished, std::vector<OpPointer>* sends);
  void await_frames(const WindowPointer& window, int source, uint64_t value, int64_t timeout_ns);
  void check(const Call& call, const Window* window) const;
  void begin(const OpPointer& op, const WindowPointer& window, Finished* finished);
  bool has_come(const Wait& wait) const;
  bool is_remote(int rank) const;
  Channel& channel(int rank) const;
  bool pump(int peer, Finished* finished);
  bool send_next(int peer, Send& send);
  void give_credits_back(int peer);
  void end_waits(Finished* finished);
  void raise_fault();
  void miss(const Op& op);
  void check_failures();
  void count(int pending);
  void count_open_window(int change);
  void end(const OpPointer& op, std::unique_ptr<Error> error, Finished* finished);
  void drop_all(Finished* finished);
  void drop(const OpPointer& op, Finished* finished);
  void drop_waits(const Window& window, Finished* finished);
  void drop_sends(const Window& window, Finished* finished);
  std::string state_of(const Op& op) const;

  Group& group_;
  std::vector<std::unique_ptr<Channel>> channels_;  // by rank; null on this host
  mutable std::mutex mutex_;                        // guards all below, and in channels what is not atomic
  std::list<Wait> waits_;
  uint64_t opened_ = 0;           // windows so far: the next one's id is one more
  int64_t n_pending_ = 0;         // ops that have not ended
  std::atomic<int> copying_{0};   // as is_copying(); counted up under the lock, and down without
  std::atomic<int64_t> busy_{0};  // these, and windows that ranks of other hosts may put into

  mutable std::mutex table_mutex_;  // taken last, also by the thread that pumps the wire
  std::map<uint64_t, WindowPointer> table_;
  std::string fault_;  // what a frame said that no rank of ours sends
  std::atomic<bool> has_fault_{false};
};

}  // namespace hxcomm
