#include "communicator/api.h"

#include <algorithm>
#include <memory>
#include <new>
#include <string>

#include "communicator/group.h"

namespace hxcomm {
namespace {

using GroupHandle = std::shared_ptr<Group>;
using OpHandle = std::shared_ptr<Op>;

// Holds the group, and with it the peers' memory.
struct WindowHandle {
  GroupHandle group;
  std::shared_ptr<Window> window;
};

thread_local std::string last_message;

WindowHandle& window_of(void* handle) { return *static_cast<WindowHandle*>(handle); }

Group& group_of(void* handle) { return **static_cast<GroupHandle*>(handle); }

int failed(const Error& error) {
  last_message = error.message();
  return static_cast<int>(error.kind());
}

template <class Function>
int guarded(Function&& function) {
  try {
    function();
    return 0;
  } catch (const Error& error) {
    return failed(error);
  } catch (const std::exception& error) {
    return failed(Error(ErrorKind::usage, error.what()));
  }
}

Call call_of(const ApiCall& from) {
  Call call;
  call.op = static_cast<OpCode>(from.op);
  call.dtype = static_cast<DType>(from.dtype);
  call.reduce_op = static_cast<ReduceOp>(from.reduce_op);
  call.factor = from.factor;
  call.root = from.root;
  call.tag = from.tag;
  call.window = from.window;
  call.offset = from.offset;
  call.uneven = from.uneven != 0;
  call.device = static_cast<DeviceKind>(from.device);
  call.count = from.count;
  for (size_t i = 0; i < from.n_input; ++i)
    call.input.push_back({static_cast<std::byte*>(from.input[i].data), from.input[i].count});
  for (size_t i = 0; i < from.n_output; ++i)
    call.output.push_back({static_cast<std::byte*>(from.output[i].data), from.output[i].count});
  call.shape.assign(from.shape, from.n_shape);
  call.timeout_ns = from.timeout_ns;
  call.hints = from.hints;
  call.name_first = from.name_first != 0;
  call.issue_ps = from.issue_ps;
  call.ticket = from.ticket;
  return call;
}

const Api kApi = {
    .version = kApiVersion,
    .message = [] { return last_message.c_str(); },
    .retain = [](void* group) -> void* { return new GroupHandle(*static_cast<GroupHandle*>(group)); },
    .release = [](void* group) { delete static_cast<GroupHandle*>(group); },
    .run =
        [](void* group, const ApiCall* call) {
          return guarded([&] {
            Group& g = group_of(group);
            g.wait(g.post(call_of(*call)));
          });
        },
    .post =
        [](void* group, const ApiCall* call, ApiOnFinish on_finish, void* context, void** op) {
          return guarded([&] {
            Group& g = group_of(group);
            const auto callback = [on_finish, context](const Error* error) {
              on_finish(context, error != nullptr ? static_cast<int>(error->kind()) : 0, error ? error->what() : "");
            };
            *op = new OpHandle(g.post(call_of(*call), callback));
            g.advance_in_background();
          });
        },
    .wait =
        [](void* group, void* op, int64_t timeout_ns) {
          return guarded([&] { group_of(group).wait(*static_cast<OpHandle*>(op), timeout_ns); });
        },
    .result =
        [](void* op, int* finished) {
          const Op& o = **static_cast<OpHandle*>(op);
          *finished = o.finished.load(std::memory_order_acquire) ? 1 : 0;
          return *finished != 0 && o.error ? failed(*o.error) : 0;
        },
    .source = [](void* op) { return (*static_cast<OpHandle*>(op))->source; },
    .release_op = [](void* op) { delete static_cast<OpHandle*>(op); },
    .refuse = [](void* group, const ApiCall* call,
                 const char* reason) { group_of(group).refuse(call_of(*call), reason); },
    .keep =
        [](void* group, void (*release)(void*), void* context) {
          try {
            group_of(group).keep_until_peers_left([release, context] { release(context); });
          } catch (...) {  // out of memory: it is kept for good
          }
        },
    .abort =
        [](void* group, const char* reason) {
          Group& g = group_of(group);
          g.abort(AbortCause::called, g.rank(), reason);
        },
    .leave = [](void* group) { group_of(group).leave(); },
    .sequence = [](void* group) { return group_of(group).next_sequence(); },
    .next_timed =
        [](void* group, ApiTimedCall* to) {
          TimedCall timed;
          if (!group_of(group).next_timed(&timed)) return 0;
          to->ticket = timed.ticket;
          to->op = static_cast<int32_t>(timed.op);
          to->root = timed.root;
          to->algorithm = timed.plan->algorithm.c_str();
          to->nbytes = timed.nbytes;
          to->item_bytes = static_cast<int32_t>(timed.item_bytes);
          std::copy(timed.issued_ps.begin(), timed.issued_ps.end(), to->issued_ps);
          return 1;
        },
    .open_window =
        [](void* group, const ApiWindow* own, const char* problem, int64_t timeout_ns, void** window) {
          return guarded([&] {
            WindowRequest request;
            request.dtype = static_cast<DType>(own->dtype);
            request.device = static_cast<DeviceKind>(own->device);
            request.data = static_cast<std::byte*>(own->data);
            request.count = own->count;
            request.shape.assign(own->shape, own->n_shape);
            request.problem = problem != nullptr ? problem : "";
            request.timeout_ns = timeout_ns;
            const auto& handle = *static_cast<GroupHandle*>(group);
            *window = new WindowHandle{handle, handle->one_sided().open(request)};
          });
        },
    .close_window =
        [](void* window, int64_t timeout_ns) {
          return guarded([&] { window_of(window).group->one_sided().close(window_of(window).window, timeout_ns); });
        },
    .drop_window = [](void* window) { window_of(window).group->one_sided().forget(window_of(window).window); },
    .release_window = [](void* window) { delete static_cast<WindowHandle*>(window); },
    .window_id = [](void* window) { return window_of(window).window->id; },
    .window_part =
        [](void* window, int rank, ApiWindow* to) {
          const Window& from = *window_of(window).window;
          const Window::Part& part = from.parts[static_cast<size_t>(rank)];
          *to = {static_cast<int32_t>(from.dtype),
                 static_cast<int32_t>(from.device),
                 part.memory,
                 part.count,
                 part.shape.extents,
                 part.shape.n_dims,
                 from.is_remote(rank) ? 0 : 1};
        },
};

}  // namespace

const Api* api() { return &kApi; }

}  // namespace hxcomm
