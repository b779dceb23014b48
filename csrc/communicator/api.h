// What front ends built into other modules (hxcomm._C, the torch glue) may know of the communicator: one versioned
// table of functions, handed over in a PyCapsule. Nothing links across the modules, so a torch upgrade rebuilds the
// glue only, and the layers cannot mix.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/errors.h"  // ErrorKind: what functions return
#include "core/types.h"   // DType, ReduceOp, DeviceKind: codes of a call

namespace hxcomm {

constexpr uint32_t kApiVersion = 6;
constexpr const char* kApiCapsule = "hxcomm._core.api";
constexpr const char* kGroupCapsule = "hxcomm._core.group";

struct ApiBlock {
  void* data;
  uint64_t count;  // elements
};

// One call. Codes are those of OpCode, DType and ReduceOp; blocks as the op's layout has them.
struct ApiCall {
  int32_t op, dtype, reduce_op, root;  // root -1: none; of a send or recv: the peer, -1 for any source
  int32_t tag;                         // of a send or recv
  uint64_t window, offset;             // of put, signal, wait_signal: its id; of a put: where, in elements
  int32_t uneven;
  int32_t device;  // DeviceKind: 1 where all blocks lie in this process's segment
  double factor;   // PREMUL_SUM
  uint64_t count;  // elements of one block
  const ApiBlock* input;
  size_t n_input;
  const ApiBlock* output;
  size_t n_output;
  const int64_t* shape;
  size_t n_shape;
  int64_t timeout_ns;
  int32_t hints;  // what the caller asks the selector for, by the number it gave that (hxcomm.select.hint_number); 0:
                  // nothing
  int32_t name_first;     // where the timeout passes, name only the first of the ranks that are missing
  int64_t issue_ps = -1;  // when this rank calls a collective, in virtual time; -1: nobody asks, it is not noted
  uint64_t ticket = 0;    // of this rank: by what it will know the call among those that next_timed() gives
};

// A collective that all ranks have begun, and when each called it in virtual time.
struct ApiTimedCall {
  uint64_t ticket;
  int32_t op, root;
  const char* algorithm;  // as long as the group lives
  uint64_t nbytes;        // of the longest block on any rank
  int32_t item_bytes;
  int64_t* issued_ps;  // by rank: room for as many as the group has
};

// This rank's part of a window, or what is known of another rank's.
struct ApiWindow {
  int32_t dtype, device;
  void* data;
  uint64_t count;  // elements
  const int64_t* shape;
  size_t n_shape;        // at most 8
  int32_t on_this_host;  // of a part that is known
};

using ApiOnFinish = void (*)(void* context, int kind, const char* message);

// Functions that can fail return 0 or an ErrorKind; message() is then its text, valid on this thread until the next
// call. None of them needs the GIL. `group` is what a group capsule holds.
struct Api {
  uint32_t version;
  const char* (*message)();
  void* (*retain)(void* group);  // a group of its own to keep, to be given back with release
  void (*release)(void* group);
  int (*run)(void* group, const ApiCall* call);  // blocks until done; blocks' memory must live that long
  // As run, but returns at once; on_finish(context, error kind, message) is called once, from any thread and perhaps
  // before post returns, when the op has ended (kind 0: well). Not called where post itself fails.
  int (*post)(void* group, const ApiCall* call, ApiOnFinish on_finish, void* context, void** op);
  int (*wait)(void* group, void* op, int64_t timeout_ns);  // timeout_ns < 0: the op's own deadline only
  int (*result)(void* op, int* finished);                  // does not block; the op's error once it has finished
  int (*source)(void* op);                                 // of a recv that has ended: whose message it met
  void (*release_op)(void* op);
  // A call that this rank refuses before it is posted: peers raise MismatchError quoting `reason`.
  void (*refuse)(void* group, const ApiCall* call, const char* reason);
  // Calls release(context), from any thread, once no peer can touch memory of failed calls of hx tensors any more;
  // never, where there is no memory to remember that. Does not throw.
  void (*keep)(void* group, void (*release)(void* context), void* context);
  void (*abort)(void* group, const char* reason);
  void (*leave)(void* group);
  uint64_t (*sequence)(void* group);  // of the next collective
  // Takes the oldest of the collectives with an issue_ps that have begun: the same ones in the same order on every
  // rank, each at the latest when it has ended well. 0: there is none.
  int (*next_timed)(void* group, ApiTimedCall* call);
  // Windows. Opening and closing are collective and block; all ranks get a window, or none: where one of them has a
  // problem (null: none) with its tensor, it raises that and its peers MismatchError. A mismatch in closing leaves the
  // window open; any other error closes it here while peers may still be storing into it, as drop_window does.
  int (*open_window)(void* group, const ApiWindow* own, const char* problem, int64_t timeout_ns, void** window);
  int (*close_window)(void* window, int64_t timeout_ns);
  void (*drop_window)(void* window);     // on this rank alone; then what close_window has not closed ends here
  void (*release_window)(void* window);  // the handle: a window that is open stays so
  uint64_t (*window_id)(void* window);
  // The data of a rank of another host is null. What it points to lives as long as the handle.
  void (*window_part)(void* window, int rank, ApiWindow* part);
};

const Api* api();

}  // namespace hxcomm
