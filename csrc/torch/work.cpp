#include "torch/work.h"

#include <ATen/ThreadLocalState.h>
#include <ATen/core/ivalue.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/Exceptions.h>

#include <algorithm>

#include "torch/errors.h"

namespace hxcomm::torch_glue {
namespace {

c10::intrusive_ptr<c10::ivalue::Future> future_of_tensors() {
  return c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()));
}

}  // namespace

// What a posted call holds: the Work it belongs to.
struct Work::Context {
  c10::intrusive_ptr<Work> work;

  static void on_finish(void* context, int kind, const char* message) {
    const std::unique_ptr<Context> self(static_cast<Context*>(context));
    self->work->call_ended(kind, message);
  }
};

void keep_if_peers_may_touch(const Api& api, void* group, int kind, c10::ArrayRef<Tensors> calls) noexcept {
  const bool touched =
      kind != 0 && kind != static_cast<int>(ErrorKind::usage) && kind != static_cast<int>(ErrorKind::mismatch);
  if (!touched || std::none_of(calls.begin(), calls.end(), [](const Tensors& call) { return call.is_hx(); })) return;
  try {
    auto kept = std::make_unique<std::vector<Tensors>>(calls.vec());
    api.keep(group, [](void* context) { delete static_cast<std::vector<Tensors>*>(context); }, kept.release());
  } catch (...) {  // no memory to remember them by
    for (const Tensors& call : calls) call.keep_forever();
  }
}

Work::Work(int rank, c10d::OpType type, std::vector<at::Tensor> results)
    : c10d::Work(rank, type), results_(std::move(results)), ended_(true) {}

Work::Work(int rank, c10d::OpType type, const Api* api, void* group, std::shared_ptr<TimedCalls> timed,
           std::vector<Tensors> calls)
    : c10d::Work(rank, type),
      api_(api),
      group_(api->retain(group)),
      timed_(std::move(timed)),
      calls_(std::move(calls)) {
  for (const Tensors& call : calls_)
    for (const at::Tensor& tensor : call.outputs()) results_.push_back(tensor);
  future_ = future_of_tensors();
  sequence_ = api_->sequence(group_);
}

Work::~Work() {
  for (void* op : ops_) api_->release_op(op);
  if (group_ != nullptr) api_->release(group_);
}

void Work::set_finish(std::vector<at::Tensor> results, std::function<void()> finish) {
  results_ = std::move(results);
  finish_ = std::move(finish);
}

void Work::set_event(Event event) {
  if (!event) return;
  // The thread that ends the last call need not be profiled itself.
  recordFunctionEndCallback_ = at::wrapPropagateTLSState([event = std::move(event)] { event->end(); });
}

void Work::post(std::chrono::milliseconds timeout) {
  running_.store(static_cast<int>(calls_.size()));
  ops_.reserve(calls_.size());
  for (size_t i = 0; i < calls_.size(); ++i) {
    ApiCall call = calls_[i].call(timeout);
    if (timed_)
      if (const uint64_t ticket = timed_->begin(call); ticket != 0) tickets_.push_back(ticket);
    auto context = std::make_unique<Context>(Context{c10::intrusive_ptr<Work>::reclaim_copy(this)});
    void* op = nullptr;
    const int kind = api_->post(group_, &call, &Context::on_finish, context.get(), &op);
    if (kind != 0) {
      const std::string message = api_->message();
      // Refused by post() as this one is: every rank's sequence counts all calls of a list, whatever becomes of them.
      for (size_t rest = i + 1; rest < calls_.size(); ++rest) {
        const ApiCall other = calls_[rest].call(timeout);
        api_->refuse(group_, &other, message.c_str());
      }
      running_.fetch_sub(static_cast<int>(calls_.size() - i - 1));
      call_ended(kind, message.c_str());
      throw_typed(kind, message);
    }
    context.release();  // on_finish owns it, and may have run already
    ops_.push_back(op);
  }
}

void Work::call_ended(int kind, const char* message) {
  if (kind != 0) {
    std::lock_guard lock(error_mutex_);
    if (error_kind_ == 0) {
      error_kind_ = kind;
      error_message_ = message;
    }
  }
  if (running_.fetch_sub(1) != 1) return;
  store_results();
  if (recordFunctionEndCallback_) std::exchange(recordFunctionEndCallback_, nullptr)();
  ended_.store(true, std::memory_order_release);
  if (const std::exception_ptr error = exception())
    future_->setError(error);
  else
    future_->markCompleted(c10::IValue(results_));
  keep_if_peers_may_touch(*api_, group_, error_kind_, calls_);
  calls_.clear();  // whoever keeps the Work need not keep the inputs
  finish_ = nullptr;
}

void Work::store_results() {
  std::lock_guard lock(error_mutex_);
  if (error_kind_ != 0) return;
  try {
    for (Tensors& call : calls_) call.copy_back();
    const c10::NoGradGuard no_grad;
    if (finish_) finish_();
  } catch (const std::exception& error) {  // no memory, say; this may be the background thread
    error_kind_ = static_cast<int>(ErrorKind::aborted);
    error_message_ = std::string("the collective was carried out, but its result could not be stored: ") + error.what();
  }
}

c10::intrusive_ptr<c10::ivalue::Future> Work::getFuture() {
  std::lock_guard lock(error_mutex_);
  if (!future_) {  // a sync call has ended before anybody asked, and few ask
    future_ = future_of_tensors();
    future_->markCompleted(c10::IValue(results_));
  }
  return future_;
}

int Work::sourceRank() const { return ops_.empty() ? -1 : api_->source(ops_[0]); }

bool Work::isCompleted() { return ended_.load(std::memory_order_acquire); }

bool Work::isSuccess() const {
  std::lock_guard lock(error_mutex_);
  return ended_.load(std::memory_order_acquire) && error_kind_ == 0;
}

std::exception_ptr Work::exception() const {
  if (!ended_.load(std::memory_order_acquire)) return nullptr;
  try {
    rethrow();
  } catch (...) {
    return std::current_exception();
  }
  return nullptr;
}

void Work::rethrow() const {
  std::string message;
  int kind = 0;
  {
    std::lock_guard lock(error_mutex_);
    kind = error_kind_;
    message = error_message_;
  }
  if (kind != 0) throw_typed(kind, message);
}

bool Work::wait(std::chrono::milliseconds timeout) {
  if (!ended_.load(std::memory_order_acquire)) {
    const int64_t timeout_ns = timeout.count() > 0 ? std::chrono::nanoseconds(timeout).count() : -1;
    int first_kind = 0;
    std::string message;
    for (void* op : ops_) {
      const int kind = api_->wait(group_, op, timeout_ns);
      if (kind != 0 && first_kind == 0) {
        first_kind = kind;
        message = api_->message();
      }
    }
    if (first_kind != 0) throw_typed(first_kind, message);
    // The op has ended, but its callback may still run on the thread that ended it (copying back, futures).
    future_->wait();
  }
  rethrow();
  if (timed_) advance_clock();
  return true;
}

void Work::advance_clock() {
  std::vector<uint64_t> tickets;
  {
    std::lock_guard lock(error_mutex_);
    tickets.swap(tickets_);
  }
  for (const uint64_t ticket : tickets) timed_->end(*api_, group_, ticket);
}

void Work::abort() { api_->abort(group_, "Work.abort() was called"); }

bool JoinedWork::isCompleted() {
  return std::all_of(works_.begin(), works_.end(), [](const auto& work) { return work->isCompleted(); });
}

bool JoinedWork::isSuccess() const {
  return std::all_of(works_.begin(), works_.end(), [](const auto& work) { return work->isSuccess(); });
}

std::exception_ptr JoinedWork::exception() const {
  for (const auto& work : works_)
    if (const std::exception_ptr error = work->exception()) return error;
  return nullptr;
}

bool JoinedWork::wait(std::chrono::milliseconds timeout) {
  std::exception_ptr first;
  for (const auto& work : works_) try {
      work->wait(timeout);
    } catch (...) {
      if (!first) first = std::current_exception();
    }
  if (first) std::rethrow_exception(first);
  return true;
}

void JoinedWork::abort() {
  for (const auto& work : works_) work->abort();
}

std::vector<at::Tensor> JoinedWork::result() {
  std::vector<at::Tensor> results;
  for (const auto& work : works_)
    for (const at::Tensor& tensor : work->result()) results.push_back(tensor);
  return results;
}

c10::intrusive_ptr<c10::ivalue::Future> JoinedWork::getFuture() {
  c10::List<c10::intrusive_ptr<c10::ivalue::Future>> futures(
      c10::FutureType::create(c10::ListType::create(c10::TensorType::get())));
  for (const auto& work : works_) futures.push_back(work->getFuture());
  return c10::collectAll(futures)->then(
      [results = result()](c10::ivalue::Future& all) {
        if (all.hasError()) std::rethrow_exception(all.exception_ptr());
        return c10::IValue(results);
      },
      c10::ListType::create(c10::TensorType::get()));
}

}  // namespace hxcomm::torch_glue
