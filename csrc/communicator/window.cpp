// How windows begin and end: what the ranks exchange, what they compare, and what happens to the memory.
#include "communicator/window.h"

#include <sched.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "communicator/group.h"
#include "core/clock.h"

namespace hxcomm {
namespace {

constexpr uint64_t kOpening = 0x31474E494E45504Full, kClosing = 0x3131474E49534F4Cull;  // no all_gather of a user's

// What a rank says of its part of a window.
struct Registration {
  uint64_t what, id;
  uint64_t offset;          // of the tensor in its segment
  uint64_t count;           // elements
  uint64_t signals_offset;  // of its signal lines in its segment
  int64_t extents[Shape::kMaxDims];
  uint32_t n_dims;
  uint8_t dtype, device, refused, reserved;
  char text[256];  // why its tensor was refused
};

Registration registration_of(const WindowRequest& request, const Window& window, const std::byte* segment) {
  Registration mine{};
  mine.what = kOpening;
  mine.id = window.id;
  mine.offset = request.count > 0 ? static_cast<uint64_t>(request.data - segment) : 0;
  mine.count = request.count;
  mine.signals_offset = window.own_signals_offset;
  std::copy_n(request.shape.extents, request.shape.n_dims, mine.extents);
  mine.n_dims = static_cast<uint32_t>(request.shape.n_dims);
  mine.dtype = static_cast<uint8_t>(request.dtype);
  mine.device = static_cast<uint8_t>(request.device);
  return mine;
}

void refuse(Registration& mine, const std::string& problem) {
  mine.refused = 1;
  mine.text[problem.copy(mine.text, sizeof(mine.text) - 1)] = '\0';
}

std::vector<Registration> registrations_in(const std::vector<std::byte>& bytes) {
  std::vector<Registration> all(bytes.size() / sizeof(Registration));
  std::memcpy(all.data(), bytes.data(), bytes.size());
  return all;
}

// All ranks have the same registrations before them, so they come to the same end.
void compare(const std::vector<Registration>& all, const std::vector<std::string>& labels, size_t me,
             const std::string& problem) {
  const Registration& mine = all[me];
  if (!problem.empty()) throw Error(ErrorKind::usage, problem);
  std::string different, parts;
  for (size_t r = 0; r < all.size(); ++r) {
    const Registration& each = all[r];
    if (each.what != kOpening)
      throw Error(ErrorKind::mismatch,
                  labels[r] + " called another operation where " + labels[me] + " registers a window");
    if (each.id != mine.id)
      throw Error(ErrorKind::mismatch, labels[me] + " registers its window " + std::to_string(mine.id) + " where " +
                                           labels[r] + " registers its window " + std::to_string(each.id) +
                                           "; register windows in the same order on every rank");
    if (each.refused != 0) {
      const std::string text(each.text, strnlen(each.text, sizeof(each.text)));
      throw Error(ErrorKind::mismatch, labels[r] + " refused its tensor: " + text + ". No window was registered.");
    }
    if (each.dtype >= kDTypes || each.device >= kDeviceKinds || each.n_dims > Shape::kMaxDims)
      throw Error(ErrorKind::aborted, labels[r] + " registered a window of an unknown dtype, device or shape");
    if (each.dtype != mine.dtype || each.device != mine.device) different = labels[r];
    parts += (parts.empty() ? "" : "; ") + labels[r] + " has " +
             elements(each.count, static_cast<DType>(each.dtype), static_cast<DeviceKind>(each.device));
  }
  if (!different.empty())
    throw Error(ErrorKind::mismatch, "the parts of a window have one dtype and one device on all ranks: " + parts +
                                         ". No window was registered.");
}

}  // namespace

void WindowMemory::open(std::byte* data, uint64_t nbytes) {
  const std::lock_guard lock(mutex_);
  data_ = data;
  nbytes_ = nbytes;
}

void WindowMemory::close() { open(nullptr, 0); }

std::string WindowMemory::store(uint64_t offset_bytes, const std::byte* data, size_t nbytes) {
  const std::lock_guard lock(mutex_);
  if (data_ == nullptr) return "";
  if (offset_bytes > nbytes_ || nbytes > nbytes_ - offset_bytes)
    return std::to_string(nbytes) + " bytes at byte " + std::to_string(offset_bytes) + " of " + std::to_string(nbytes_);
  std::memcpy(data_ + offset_bytes, data, nbytes);
  return "";
}

// A window of this rank alone. Where there is no memory for its signals, that is the request's problem from now on.
OneSided::WindowPointer OneSided::make(WindowRequest& request) {
  const auto n = static_cast<size_t>(group_.world_size());
  auto window = std::make_shared<Window>(n);
  window->dtype = request.dtype;
  window->device = request.device;
  try {
    window->own_signals_offset = group_.endpoint_->segment().allocate(n * sizeof(SignalLine));
  } catch (const Error& error) {
    if (request.problem.empty()) request.problem = error.message();
  }
  std::byte* lines = group_.segments_[static_cast<size_t>(group_.rank())] + window->own_signals_offset;
  for (size_t r = 0; r < n && window->own_signals_offset > 0; ++r) new (lines + r * sizeof(SignalLine)) SignalLine{};
  window->own_signals = reinterpret_cast<SignalLine*>(lines);
  Window::Part& own = window->parts[static_cast<size_t>(group_.rank())];
  own.memory = request.data;
  own.count = request.count;
  own.shape = request.shape;
  own.signals = &window->own_signals[group_.rank()];
  if (request.problem.empty()) window->memory.open(request.data, request.count * item_size(request.dtype));
  if (group_.crossing_) window->mirrored = std::make_unique<SignalLine[]>(n);
  for (size_t r = 0; r < n; ++r)
    if (is_remote(static_cast<int>(r))) window->parts[r].signals = &window->mirrored[r];
  const std::lock_guard lock(mutex_);
  window->id = opened_ + 1;
  {
    const std::lock_guard table(table_mutex_);
    table_[window->id] = window;
  }
  // Somebody must hear what other hosts put here while this rank waits for nothing: whoever waits in exchange() wakes
  // the background thread at its end.
  if (group_.crossing_) count_open_window(+1);
  return window;
}

std::vector<std::byte> OneSided::exchange(const void* mine, size_t nbytes, int64_t timeout_ns) {
  const auto n = static_cast<size_t>(group_.world_size());
  std::vector<std::byte> own(nbytes), all(n * nbytes);
  std::memcpy(own.data(), mine, nbytes);
  Call call;
  call.op = OpCode::all_gather;
  call.dtype = DType::uint8;
  call.count = nbytes;
  call.input.push_back({own.data(), nbytes});
  for (size_t r = 0; r < n; ++r) call.output.push_back({all.data() + r * nbytes, nbytes});
  call.timeout_ns = timeout_ns;
  group_.wait(group_.post(std::move(call)));
  return all;
}

std::shared_ptr<Window> OneSided::open(const WindowRequest& request) {
  group_.refuse_after_fork();
  const auto me = static_cast<size_t>(group_.rank());
  WindowRequest checked = request;
  std::string& problem = checked.problem;
  const std::byte* first = group_.segments_[me];
  const uint64_t nbytes = request.count * item_size(request.dtype);
  if (problem.empty() && request.count > 0 &&
      (request.data < first || request.data + nbytes > first + group_.segment_bytes_[me]))
    problem = "a window's tensor does not lie in this process's segment, which its peers map";
  const WindowPointer window = make(checked);
  Registration mine = registration_of(request, *window, first);
  if (!problem.empty()) refuse(mine, problem);
  std::vector<Registration> all;
  try {
    all = registrations_in(exchange(&mine, sizeof mine, request.timeout_ns));
  } catch (const Error& error) {
    withdraw(window, /*peers_are_done=*/error.kind() == ErrorKind::mismatch);
    throw;
  }
  try {
    {
      const std::lock_guard lock(mutex_);
      ++opened_;
    }
    compare(all, group_.config_.labels, me, problem);
    for (size_t r = 0; r < all.size(); ++r)
      if (r != me) bind(*window, r, all[r].offset, all[r].count, all[r].signals_offset, all[r].extents, all[r].n_dims);
  } catch (const Error& error) {
    withdraw(window, /*peers_are_done=*/error.kind() != ErrorKind::aborted);
    if (error.kind() == ErrorKind::aborted) group_.abort(AbortCause::called, group_.rank(), error.message());
    throw;
  }
  return window;
}

// Where a peer's part lies: another process's numbers, so every one is checked.
void OneSided::bind(Window& window, size_t rank, uint64_t offset, uint64_t count, uint64_t signals_offset,
                    const int64_t* extents, size_t n_dims) {
  Window::Part& part = window.parts[rank];
  part.count = count;
  part.shape.assign(extents, n_dims);
  if (is_remote(static_cast<int>(rank))) return;
  const size_t segment = group_.segment_bytes_[rank];
  const size_t lines = static_cast<size_t>(group_.world_size()) * sizeof(SignalLine);
  if (offset > segment || count > (segment - offset) / item_size(window.dtype) ||
      signals_offset % alignof(SignalLine) != 0 || signals_offset > segment || segment - signals_offset < lines)
    throw Error(ErrorKind::aborted, group_.config_.labels[rank] + " registered a window of " + std::to_string(count) +
                                        " elements at byte " + std::to_string(offset) + " and signals at byte " +
                                        std::to_string(signals_offset) + " of its segment of " +
                                        std::to_string(segment) + ": its memory is corrupt");
  part.memory = group_.segments_[rank] + offset;
  part.signals = reinterpret_cast<const SignalLine*>(group_.segments_[rank] + signals_offset) + group_.rank();
}

// Ends the waits of this window here, and says which of its sends are still on their way.
void OneSided::start_closing(const WindowPointer& window, Finished* finished, std::vector<OpPointer>* sends) {
  const std::lock_guard lock(mutex_);
  if (window->closing)
    throw Error(ErrorKind::usage, "window " + std::to_string(window->id) + " has been deregistered on this rank");
  window->closing = true;
  drop_waits(*window, finished);
  for (const auto& channel : channels_)
    if (channel)
      for (const Send& send : channel->queue)
        if (send.window == window) sends->push_back(send.op);
}

void OneSided::close(const WindowPointer& window, int64_t timeout_ns) {
  Finished finished;
  std::vector<OpPointer> sends;
  start_closing(window, &finished, &sends);
  group_.complete(finished);
  const auto n = static_cast<size_t>(group_.world_size());
  try {
    for (const OpPointer& send : sends) group_.wait(send);
    while (window->copying.load(std::memory_order_acquire) > 0) sched_yield();
    std::vector<uint64_t> mine{kClosing, window->id};
    for (const Window::Part& part : window->parts) mine.push_back(part.framed);
    const std::vector<std::byte> bytes = exchange(mine.data(), mine.size() * sizeof(uint64_t), timeout_ns);
    std::vector<uint64_t> words(bytes.size() / sizeof(uint64_t));
    std::memcpy(words.data(), bytes.data(), bytes.size());
    for (size_t r = 0; r < n; ++r)
      if (words[r * (n + 2)] != kClosing || words[r * (n + 2) + 1] != window->id)
        throw Error(ErrorKind::mismatch, group_.config_.labels[static_cast<size_t>(group_.rank())] +
                                             " deregisters window " + std::to_string(window->id) + " where " +
                                             group_.config_.labels[r] +
                                             " deregisters another one, or none; no window was deregistered");
    for (size_t r = 0; r < n; ++r)
      if (is_remote(static_cast<int>(r)))
        await_frames(window, static_cast<int>(r), words[r * (n + 2) + 2 + static_cast<size_t>(group_.rank())],
                     timeout_ns);
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::mismatch) {
      forget(window);
      throw;
    }
    const std::lock_guard lock(mutex_);
    window->closing = false;
    throw;
  }
  withdraw(window, /*peers_are_done=*/true);
}

void OneSided::await_frames(const WindowPointer& window, int source, uint64_t value, int64_t timeout_ns) {
  const auto op = std::make_shared<Op>();
  op->call.op = OpCode::wait_signal;
  op->call.root = source;
  op->call.window = window->id;
  op->posted_ns = now_ns();
  op->deadline_ns = timeout_ns > 0 ? op->posted_ns + timeout_ns : INT64_MAX;
  op->record = static_cast<int64_t>(group_.own().flight.open(*op));
  {
    const std::lock_guard lock(mutex_);
    waits_.push_back({op, window, value, Awaits::frames});
    count(+1);
  }
  group_.wait(op);
}

void OneSided::forget(const WindowPointer& window) noexcept {
  if (group_.forked()) return;  // its memory is not mapped here, and its locks may be held forever
  try {
    Finished finished;
    {
      const std::lock_guard lock(mutex_);
      window->closing = true;
      drop_waits(*window, &finished);
      drop_sends(*window, &finished);
    }
    group_.complete(finished);
    withdraw(window, /*peers_are_done=*/false);
  } catch (...) {  // out of memory: its page is kept for good
  }
}

void OneSided::withdraw(const WindowPointer& window, bool peers_are_done) {
  {
    const std::lock_guard table(table_mutex_);
    const auto found = table_.find(window->id);
    if (found == table_.end() || found->second != window) return;
    table_.erase(found);
  }
  window->memory.close();
  if (group_.crossing_) count_open_window(-1);
  const size_t nbytes = static_cast<size_t>(group_.world_size()) * sizeof(SignalLine);
  if (window->own_signals_offset == 0) return;
  if (peers_are_done)
    group_.endpoint_->segment().release(window->own_signals_offset, nbytes);
  else
    group_.endpoint_->bury({{window->own_signals_offset, nbytes}}, group_.all_left());
}

void OneSided::forget_all() {
  std::vector<WindowPointer> open;
  {
    const std::lock_guard table(table_mutex_);
    for (const auto& [id, window] : table_) open.push_back(window);
  }
  for (const WindowPointer& window : open) forget(window);
}

}  // namespace hxcomm
