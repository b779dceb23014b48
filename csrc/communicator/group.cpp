#include "communicator/group.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <numeric>
#include <thread>

#include "core/checks.h"
#include "core/clock.h"
#include "core/failpoint.h"

namespace hxcomm {
namespace {

// Counted in forked children: what the parent made is gone there, mappings (MADV_DONTFORK) and threads alike.
std::atomic<int> forks{0};
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });

// How long a rank that leaves takes to pay what it owes.
constexpr int64_t kDebtsNs = 1'000'000'000;

int usable_cores() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return 1;
  return CPU_COUNT(&set);
}

ErrorKind kind_of(AbortCause cause) {
  switch (cause) {
    case AbortCause::peer_died:
    case AbortCause::peer_left:
      return ErrorKind::peer_failed;
    case AbortCause::timeout:
      return ErrorKind::timeout;
    default:
      return ErrorKind::aborted;
  }
}

}  // namespace

Group::Group(std::shared_ptr<Endpoint> endpoint, std::shared_ptr<Progress> progress, GroupConfig config)
    : endpoint_(std::move(endpoint)),
      progress_(std::move(progress)),
      config_(std::move(config)),
      point_to_point_(*this),
      one_sided_(*this) {
  const auto n = static_cast<size_t>(config_.world_size);
  peers_.resize(n);
  controls_.resize(n);
  lines_.resize(n);
  segments_.resize(n);
  segment_bytes_.resize(n);
  scratch_.resize(n);
  inputs_.resize(n);
  outputs_.resize(n);
  config_.labels.resize(n);
  local_.resize(n);
  std::iota(local_.begin(), local_.end(), 0);
  next_sequence_.store(config_.first_sequence);

  forks_at_birth_ = forks.load();
  endpoint_->dig();
  control_offset_ = endpoint_->segment().allocate(control_bytes(config_.world_size));
  const auto me = static_cast<size_t>(config_.rank);
  segments_[me] = endpoint_->segment().base();
  segment_bytes_[me] = endpoint_->segment().nbytes();
  controls_[me] = new (segments_[me] + control_offset_) Control{};
  lines_[me] = &controls_[me]->line;
  // Fingerprints of sequences before the first belong to nobody; progress says "everything before the first is done".
  lines_[me]->publish(progress_value(config_.first_sequence - 1, kMaxRounds));
  lines_[me]->join(config_.nonce);
  Identity& identity = controls_[me]->identity;
  identity.rank = config_.rank;
  identity.world_size = config_.world_size;
  config_.name.copy(identity.name, sizeof(identity.name) - 1);
  endpoint_->segment().enlist(config_.nonce, control_offset_);

  const bool oversubscribed = config_.world_size > usable_cores();
  // A pause takes 40 to 70 cycles (140 on newer Intel cores), so 1,500 are 20 to 60 us: longer than any hand-over,
  // short against a sleep and wake-up (50 us and more in a virtual machine). Yielding after 300 was no better, also
  // with both ranks on one core.
  spin_pauses_ = oversubscribed ? 16 : 1500;
  spin_yields_ = oversubscribed ? 200 : 20;
  if (config_.spin_ns >= 0) {
    spin_pauses_ = static_cast<int>(config_.spin_ns / 25);
    spin_yields_ = config_.spin_ns == 0 ? 0 : spin_yields_;
  }
}

Group::~Group() {
  leave();
  if (forked()) return;
  progress_->remove(this);
  if (crossing_) endpoint_->wire()->unsubscribe(config_.nonce);
  // A peer may be in the middle of the last operation and read our scratch: it is done with us when it has left too.
  std::vector<Endpoint::Range> ranges{{control_offset_, control_bytes(config_.world_size)}};
  for (const Slot& slot : slots_)
    if (slot.nbytes > 0) ranges.push_back({slot.offset, slot.nbytes});
  for (const Endpoint::Range& ring : point_to_point_.ranges()) ranges.push_back(ring);
  endpoint_->bury(std::move(ranges), all_left());
}

void Group::attach(int rank, std::shared_ptr<Peer> peer, uint64_t control_offset) {
  const auto r = static_cast<size_t>(rank);
  const size_t segment = peer->mapping->nbytes();
  if (control_offset % 4096 != 0 || control_offset > segment ||
      segment - control_offset < control_bytes(config_.world_size))
    throw Error(ErrorKind::init, config_.labels[r] + " says its control page lies at byte " +
                                     std::to_string(control_offset) + " of a segment of " + std::to_string(segment));
  segments_[r] = peer->mapping->base();
  segment_bytes_[r] = segment;
  controls_[r] = reinterpret_cast<Control*>(segments_[r] + control_offset);
  lines_[r] = &controls_[r]->line;
  peers_[r] = std::move(peer);
}

void Group::cross(std::vector<int> hosts, std::vector<Nonce> processes) {
  const size_t page = control_bytes(config_.world_size);
  local_.clear();
  for (int r = 0; r < config_.world_size; ++r) {
    const auto i = static_cast<size_t>(r);
    if (hosts[i] == hosts[static_cast<size_t>(config_.rank)]) {
      local_.push_back(r);
      continue;
    }
    // Only this process writes to it: whether that rank has left, and why it ended the group.
    mirrors_.push_back(std::make_unique<std::byte[]>(page + alignof(Control)));
    void* room = mirrors_.back().get();
    size_t space = page + alignof(Control);
    controls_[i] = new (std::align(alignof(Control), page, room, space)) Control{};
    lines_[i] = &controls_[i]->line;
    lines_[i]->join(config_.nonce);
  }
  one_sided_.cross(hosts);
  crossing_ = std::make_shared<Crossing>(*this, endpoint_, std::move(hosts), std::move(processes));
  endpoint_->wire()->subscribe(config_.nonce, crossing_);
}

void Group::start(Planner planner, std::shared_ptr<TransferHook> hook) {
  planner_ = std::move(planner);
  hook_ = std::move(hook);
  progress_->add(shared_from_this());
  death_token_ = endpoint_->subscribe([weak = weak_from_this()](const Peer* peer) {
    if (const auto group = weak.lock()) peer != nullptr ? group->on_death(*peer) : group->acknowledge_abort();
  });
  for (const auto& peer : peers_)
    if (peer && peer->dead.load(std::memory_order_acquire)) on_death(*peer);
}

void Group::on_death(const Peer& peer) {
  for (int r = 0; r < config_.world_size; ++r)
    if (peers_[static_cast<size_t>(r)].get() == &peer) {
      // A rank that said goodbye before it died is nobody's loss.
      if (!control(r).line.is_member(config_.nonce)) return;
      abort(AbortCause::peer_died, r, config_.labels[static_cast<size_t>(r)] + " " + peer.death);
    }
}

void Group::abort(AbortCause cause, int subject, const std::string& reason) {
  if (forked()) return;
  // The other causes' texts name this rank or the one that failed.
  const std::string text =
      cause == AbortCause::called ? config_.labels[static_cast<size_t>(config_.rank)] + ": " + reason : reason;
  const uint64_t word = abort_word(cause, static_cast<uint32_t>(config_.rank), static_cast<uint32_t>(subject));
  std::lock_guard telling(telling_);
  {
    std::lock_guard lock(abort_mutex_);
    if (own().abort.is_set()) return;
    const size_t n = std::min(text.size(), Control::kReasonBytes - 1);
    std::memcpy(own().reason, text.data(), n);
    own().reason[n] = '\0';
    // Our own word first: if a peer's abort got here before ours, that one is the cause that all will name.
    if (!own().abort.set(word)) return;
    failpoint(Failpoint::abort);
    for (int r = 0; r < config_.world_size; ++r) {
      if (r == config_.rank || controls_[static_cast<size_t>(r)] == nullptr) continue;
      if (control(r).line.is_member(config_.nonce)) control(r).abort.set(word);
    }
  }
  ring_sleepers();
  endpoint_->ring_own_doorbell();
  // Without abort_mutex_: whoever pumps the wire holds the wire's, and may be in end_by().
  if (crossing_) crossing_->tell_abort(word, text);
}

void Group::end_by(int rank, uint64_t word, std::string_view reason) {
  const auto cause = abort_cause(word);
  if (forked() || abort_origin(word) != static_cast<uint32_t>(rank) || cause == AbortCause::none ||
      cause >= AbortCause::left)
    return;
  // Passed on within this host, in this rank's name: one beside it whose frame is late would see this rank leave first.
  const uint64_t mine = abort_word(cause, static_cast<uint32_t>(config_.rank), static_cast<uint32_t>(word));
  {
    std::lock_guard lock(abort_mutex_);
    if (own().abort.is_set()) return;
    own().reason[reason.copy(own().reason, Control::kReasonBytes - 1)] = '\0';
    if (!own().abort.set(mine)) return;
    for (const int r : local_)
      if (r != config_.rank && control(r).line.is_member(config_.nonce)) control(r).abort.set(mine);
  }
  ring_sleepers();
  endpoint_->ring_own_doorbell();
}

// Where peers reach a rank's tensors, its user may have them back only when every peer has been told: one that goes on
// reads what the user writes there, and must find its word set when it looks once more before its own op ends well.
void Group::pass_on_abort() {
  {
    std::lock_guard lock(abort_mutex_);
    uint64_t word = own().abort.cause();
    if (abort_cause(word) == AbortCause::left) {
      const auto me = static_cast<uint32_t>(config_.rank);
      const std::string text = config_.labels[me] + " has left the group in the middle of an operation";
      text.copy(own().reason, Control::kReasonBytes - 1);
      own().reason[std::min(text.size(), Control::kReasonBytes - 1)] = '\0';
      word = abort_word(AbortCause::peer_left, me, me);
    }
    for (int r = 0; r < config_.world_size; ++r)
      if (r != config_.rank && control(r).line.is_member(config_.nonce)) control(r).abort.set(word);
  }
  ring_sleepers();
}

void Group::keep_until_peers_left(std::function<void()> release) {
  if (forked()) return;
  endpoint_->bury({}, all_left(), std::move(release));
}

std::function<bool()> Group::all_left() const {
  return [peers = peers_, lines = lines_, nonce = config_.nonce] {
    for (size_t r = 0; r < peers.size(); ++r)
      if (peers[r] && !peers[r]->dead.load() && lines[r]->is_member(nonce)) return false;
    return true;
  };
}

void Group::leave() {
  if (left_.exchange(true)) return;
  if (forked()) return;  // the mapping and the threads are the parent's; its locks may be held forever here
  pay_debts();
  endpoint_->unsubscribe(death_token_);
  failpoint(Failpoint::leave);
  endpoint_->segment().strike(control_offset_);
  // Pending operations of this rank end here; the peers learn from the membership word, when they miss us. The reason
  // stays as it is: peers quote it for an abort that began here.
  const auto me = static_cast<uint32_t>(config_.rank);
  own().abort.set(abort_word(AbortCause::left, me, me));
  Finished finished;
  {
    std::lock_guard lock(driver_);
    advance(&finished, false);
    point_to_point_.fail_all(&finished);
    one_sided_.fail_all(&finished);
    while (one_sided_.is_copying()) sched_yield();  // a put of another thread: who has left writes to nobody's memory
    // Not while abort() runs on another thread (the watcher's, say): it writes to the members' pages, and a peer that
    // sees us leave may give its page back.
    std::lock_guard no_abort(abort_mutex_);
    own().line.leave();
    ring_sleepers();
  }
  if (crossing_) {
    // Who hears that this rank left before it hears of the abort blames this rank.
    std::lock_guard told(telling_);
    crossing_->leave();
  }
  complete(finished);
  one_sided_.forget_all();
  keep_statistics();
}

// What peers wait for, though nobody here does: the verdict on a refused call, which this host's leader gives to the
// other hosts, and replies to messages that are not in a ring yet. Who left before would be taken for the cause of the
// peers' errors.
void Group::pay_debts() {
  const int64_t latest = now_ns() + kDebtsNs;
  const auto owes = [this] {
    if (point_to_point_.owes()) return true;
    std::lock_guard lock(queue_mutex_);
    return !queue_.empty() && !queue_.front()->refusal.empty();
  };
  while (owes() && !own().abort.is_set() && now_ns() < latest) {
    const uint32_t doorbell = endpoint_->announce_sleep();
    if (!try_advance(true) && owes()) endpoint_->sleep(doorbell, kDebtsNs / 100);
    endpoint_->withdraw_sleep();
  }
}

std::string Group::death_of(int rank) const {
  const auto& peer = peers_[static_cast<size_t>(rank)];
  if (crossing_ && crossing_->is_remote(rank)) {
    const std::string loss = crossing_->loss_of(rank);
    return loss.empty() ? "" : config_.labels[static_cast<size_t>(rank)] + " " + loss;
  }
  if (!peer || !peer->dead.load(std::memory_order_acquire)) return "";
  return config_.labels[static_cast<size_t>(rank)] + " " + peer->death;
}

std::vector<int> Group::hosts() const {
  return crossing_ ? crossing_->hosts() : std::vector<int>(static_cast<size_t>(config_.world_size), 0);
}

bool Group::alive() const { return !left_.load() && !forked() && !own().abort.is_set(); }

std::string Group::reason_of(uint64_t word) const {
  const auto origin = static_cast<size_t>(abort_origin(word));
  if (abort_cause(word) == AbortCause::left) return "this rank has destroyed the group";
  // The rank that noticed wrote down why. Its page keeps that, whether it has left or died since, for as long as this
  // rank is a member (Endpoint::bury).
  if (origin < controls_.size() && controls_[origin] != nullptr && own().line.is_member(config_.nonce)) {
    char copy[Control::kReasonBytes];
    std::memcpy(copy, controls_[origin]->reason, sizeof(copy));
    if (const size_t length = strnlen(copy, sizeof(copy)); length > 0) return {copy, length};
  }
  return (origin < config_.labels.size() ? config_.labels[origin] : "a rank") + " ended the group";
}

std::unique_ptr<Error> Group::failure(const Op* op) const {
  const uint64_t word = own().abort.cause();
  std::string text = reason_of(word);
  if (op != nullptr)
    text = std::string(op_name(op->call.op)) +
           (op->first_sequence > 0 ? " #" + std::to_string(op->first_sequence) : "") + " on " +
           config_.labels[static_cast<size_t>(config_.rank)] + " ended: " + text;
  text += ". Group '" + config_.name + "' is closed: ";
  text += abort_cause(word) == AbortCause::timeout
              ? "find out what the ranks it waited for were doing, or create the group with a timeout longer than that."
              : "destroy it and, with the ranks that remain, create a new one.";
  if (!config_.dump_folder.empty() && abort_cause(word) != AbortCause::left) text += dump(text);
  return std::make_unique<Error>(kind_of(abort_cause(word)), text);
}

size_t Group::KeyHash::operator()(const ChoiceKey& key) const {
  uint64_t hash = key.nbytes * 0x9E3779B97F4A7C15ull;
  hash ^= (uint64_t{static_cast<uint8_t>(key.op)} << 24) ^ (uint64_t{static_cast<uint8_t>(key.dtype)} << 16) ^
          (uint64_t{static_cast<uint8_t>(key.reduce_op)} << 8) ^ (uint64_t{key.mapped} << 40) ^
          (uint64_t{static_cast<uint32_t>(key.hints)} << 41) ^ static_cast<uint32_t>(key.root + 1);
  return static_cast<size_t>(hash ^ (hash >> 32));
}

Choice Group::choose(const Call& call) {
  if (reduces(call.op) && !has_meaning(call.dtype, call.reduce_op))
    throw Error(ErrorKind::usage, std::string(op_name(call.op)) + ": " + unsupported(call.dtype, call.reduce_op));
  // Only a rank knows its own factor, so PREMUL_SUM is staged: contributions lie multiplied in scratch.
  const bool mapped = call.device == DeviceKind::hx && call.reduce_op != ReduceOp::premul_sum;
  const ChoiceKey key{
      call.op, call.dtype, call.reduce_op, call.root, call.uneven ? 0 : call.count * item_size(call.dtype),
      mapped,  call.hints};
  {
    std::lock_guard lock(planner_mutex_);
    if (const auto it = choices_.find(key); it != choices_.end()) return it->second;
  }
  // Without the lock: the planner is Python and takes the GIL.
  Choice choice = planner_(key);
  if (!choice.plan || choice.plan->world_size != config_.world_size || choice.plan->rank != config_.rank ||
      choice.plan->is_private == mapped || choice.plan->crosses != (crossing_ != nullptr))
    throw Error(ErrorKind::usage, std::string("the selector gave ") + op_name(call.op) +
                                      " a plan that is not for this rank, world size, these hosts and " +
                                      (mapped ? "mapped" : "private") + " memory");
  if (reduces(call.op) && call.reduce_op == ReduceOp::premul_sum && choice.plan->moves_contributions)
    throw Error(ErrorKind::usage, std::string(op_name(call.op)) + ": algorithm '" + choice.plan->algorithm +
                                      "' copies contributions to outputs, where PREMUL_SUM cannot multiply them; "
                                      "choose another one for it (HXCOMM_ALGO, Options or a selector)");
  std::lock_guard lock(planner_mutex_);
  choice.statistic = statistic_of(call, choice);
  // A program of ever new sizes must not grow this forever; planning anew is cheap, compiled plans are kept elsewhere.
  if (choices_.size() >= 4096) choices_.clear();
  return choices_.emplace(key, std::move(choice)).first->second;
}

bool Group::forked() const { return forks.load(std::memory_order_relaxed) != forks_at_birth_; }

void Group::refuse_after_fork() const {
  if (forked())
    throw Error(ErrorKind::usage,
                "group '" + config_.name +
                    "' belongs to the parent of this forked process: shared memory and threads do "
                    "not survive a fork. Use the 'spawn' start method, or make a group of its own here.");
}

std::shared_ptr<Op> Group::post_message(std::shared_ptr<Op> op) {
  const Call& call = op->call;
  const bool recv = call.op == OpCode::recv;
  if (call.root >= config_.world_size || call.root < (recv ? kAnySource : 0))
    throw Error(ErrorKind::usage, std::string(op_name(call.op)) + ": there is no rank " + std::to_string(call.root) +
                                      " in a group of " + std::to_string(config_.world_size));
  const Blocks& blocks = recv ? call.output : call.input;
  if (blocks.size() != 1 || blocks[0].count != call.count)
    throw Error(ErrorKind::usage, std::string(op_name(call.op)) + " takes one tensor");
  if (call.device == DeviceKind::hx) require_in_segment(call);
  op->posted_ns = now_ns();
  op->deadline_ns = call.timeout_ns > 0 ? op->posted_ns + call.timeout_ns : INT64_MAX;
  op->record = static_cast<int64_t>(own().flight.open(*op));
  Finished finished;
  try {
    point_to_point_.post(op, &finished);
  } catch (const Error&) {
    own().flight.close(static_cast<uint64_t>(op->record), /*well=*/false, op->posted_ns);
    complete(finished);
    advance_in_background();  // a reply may be due
    throw;
  }
  complete(finished);
  return op;
}

void Group::require_in_segment(const Call& call) const {
  const auto me = static_cast<size_t>(config_.rank);
  for (const Blocks* blocks : {&call.input, &call.output})
    for (const Block& block : *blocks)
      if (block.count > 0 && (block.data < segments_[me] ||
                              block.data + block.count * item_size(call.dtype) > segments_[me] + segment_bytes_[me]))
        throw Error(ErrorKind::usage,
                    std::string(op_name(call.op)) + ": a tensor of device hx does not lie in this process's segment");
}

std::shared_ptr<Op> Group::post(Call call, std::function<void(const Error*)> on_finish) {
  refuse_after_fork();
  if (left_.load(std::memory_order_relaxed))
    throw Error(ErrorKind::usage, "group '" + config_.name + "' has been destroyed on this rank");
  if (kChecked && own().abort.is_set()) throw *failure(nullptr);

  failpoint(Failpoint::post);
  auto op = std::make_shared<Op>();
  op->call = std::move(call);
  if (progress_->call_site) progress_->call_site(op->call_site, sizeof(op->call_site));
  if (is_point_to_point(op->call.op)) {
    op->on_finish = std::move(on_finish);
    return post_message(std::move(op));
  }
  if (is_one_sided(op->call.op)) {
    op->on_finish = std::move(on_finish);
    return one_sided_.post(std::move(op));
  }
  if (!reduces(op->call.op)) op->call.reduce_op = ReduceOp::sum;
  try {
    op->choice = choose(op->call);
    const Plan& plan = *op->choice.plan;
    const auto me = static_cast<size_t>(config_.rank);
    if (op->call.input.size() < static_cast<size_t>(plan.input_blocks[me]) ||
        op->call.output.size() < static_cast<size_t>(plan.output_blocks[me]))
      throw Error(ErrorKind::usage,
                  std::string(op_name(op->call.op)) + " was called with fewer tensors than its plan has blocks");
    if (op->mapped()) require_in_segment(op->call);
  } catch (const Error& error) {
    refuse(op->call, error.message());
    throw;
  }
  op->on_finish = std::move(on_finish);
  return enqueue(std::move(op));
}

std::shared_ptr<Op> Group::enqueue(std::shared_ptr<Op> op) {
  op->posted_ns = now_ns();
  op->deadline_ns = op->call.timeout_ns > 0 ? op->posted_ns + op->call.timeout_ns : INT64_MAX;
  std::lock_guard lock(queue_mutex_);
  queue_.push_back(op);
  own().flight.n_queued.store(queue_.size(), std::memory_order_relaxed);
  posted_.fetch_add(1, std::memory_order_relaxed);
  progress_->operation_posted();
  return op;
}

void Group::refuse(Call call, const std::string& reason) noexcept {
  try {
    if (!alive() || call.op > OpCode::barrier) return;  // a message that was never sent has no place in any order
    auto op = std::make_shared<Op>();
    op->call = std::move(call);
    op->refusal = reason;
    enqueue(std::move(op));
    advance_in_background();
  } catch (...) {  // out of memory: the peers will find out by their timeout
  }
}

}  // namespace hxcomm
