#include "transport/zmq_library.h"

#include <dlfcn.h>
#include <link.h>

#include <string>
#include <string_view>

#include "core/errors.h"

namespace hxcomm {
namespace {

// The path of a loaded object whose file name begins so ("libzmq" finds "libzmq-2f02442c.so.5.2.5"); "" if there is
// none.
std::string loaded_object(const char* beginning) {
  struct Search {
    std::string_view beginning;
    std::string found;
  } search{beginning, {}};
  const auto look = [](dl_phdr_info* object, size_t, void* data) {
    auto& wanted = *static_cast<Search*>(data);
    const std::string_view path = object->dlpi_name;
    const std::string_view name = path.substr(path.rfind('/') + 1);
    if (!name.starts_with(wanted.beginning) || name.find(".so") == std::string_view::npos) return 0;
    wanted.found = path;
    return 1;
  };
  dl_iterate_phdr(look, &search);
  return search.found;
}

// A library with its functions; looked up in what is loaded, then on the loader's path.
class Library {
 public:
  Library(const char* beginning, const char* system_name, const char* what_for) {
    if (const std::string path = loaded_object(beginning); !path.empty())
      handle_ = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
    if (handle_ == nullptr) handle_ = dlopen(system_name, RTLD_NOW);
    if (handle_ != nullptr) return;
    const char* why = dlerror();
    throw Error(ErrorKind::init, std::string(what_for) + " needs " + beginning +
                                     ": the process has loaded none (`import zmq` of a "
                                     "pyzmq wheel does), and " +
                                     system_name + " of the system: " + (why ? why : "not found") +
                                     ". Install pyzmq with pip, or the system's " + beginning);
  }

  template <typename Function>
  void find(Function*& function, const char* name) const {
    function = reinterpret_cast<Function*>(dlsym(handle_, name));
    if (function == nullptr)
      throw Error(ErrorKind::init, std::string("the library that is loaded has no ") + name + ": install a newer one");
  }

 private:
  void* handle_ = nullptr;  // kept: the functions are used until the process ends
};

ZmqLibrary find_zmq() {
  const Library library("libzmq", "libzmq.so.5", "hxcomm across hosts");
  ZmqLibrary zmq{};
  library.find(zmq.ctx_new, "zmq_ctx_new");
  library.find(zmq.ctx_set, "zmq_ctx_set");
  library.find(zmq.ctx_term, "zmq_ctx_term");
  library.find(zmq.socket, "zmq_socket");
  library.find(zmq.close, "zmq_close");
  library.find(zmq.setsockopt, "zmq_setsockopt");
  library.find(zmq.getsockopt, "zmq_getsockopt");
  library.find(zmq.bind, "zmq_bind");
  library.find(zmq.connect, "zmq_connect");
  library.find(zmq.disconnect, "zmq_disconnect");
  library.find(zmq.socket_monitor, "zmq_socket_monitor");
  library.find(zmq.send, "zmq_send");
  library.find(zmq.msg_init, "zmq_msg_init");
  library.find(zmq.msg_init_size, "zmq_msg_init_size");
  library.find(zmq.msg_init_data, "zmq_msg_init_data");
  library.find(zmq.msg_send, "zmq_msg_send");
  library.find(zmq.msg_recv, "zmq_msg_recv");
  library.find(zmq.msg_close, "zmq_msg_close");
  library.find(zmq.msg_move, "zmq_msg_move");
  library.find(zmq.msg_copy, "zmq_msg_copy");
  library.find(zmq.msg_data, "zmq_msg_data");
  library.find(zmq.msg_size, "zmq_msg_size");
  library.find(zmq.msg_more, "zmq_msg_more");
  library.find(zmq.msg_get, "zmq_msg_get");
  library.find(zmq.curve_public, "zmq_curve_public");
  library.find(zmq.z85_encode, "zmq_z85_encode");
  library.find(zmq.z85_decode, "zmq_z85_decode");
  library.find(zmq.strerror, "zmq_strerror");
  library.find(zmq.version, "zmq_version");
  return zmq;
}

SodiumLibrary find_sodium() {
  const Library library("libsodium", "libsodium.so.23", "security mode mac");
  SodiumLibrary sodium{};
  library.find(sodium.init, "sodium_init");
  library.find(sodium.auth_hmacsha256, "crypto_auth_hmacsha256");
  library.find(sodium.stream_chacha20_ietf, "crypto_stream_chacha20_ietf");
  library.find(sodium.onetimeauth_poly1305_init, "crypto_onetimeauth_poly1305_init");
  library.find(sodium.onetimeauth_poly1305_update, "crypto_onetimeauth_poly1305_update");
  library.find(sodium.onetimeauth_poly1305_final, "crypto_onetimeauth_poly1305_final");
  library.find(sodium.onetimeauth_poly1305_statebytes, "crypto_onetimeauth_poly1305_statebytes");
  if (sodium.init() < 0) throw Error(ErrorKind::init, "libsodium: sodium_init() failed");
  return sodium;
}

}  // namespace

const ZmqLibrary& ZmqLibrary::load() {
  static const ZmqLibrary library = find_zmq();  // where it throws, the next call looks again
  return library;
}

const SodiumLibrary& SodiumLibrary::load() {
  static const SodiumLibrary library = find_sodium();
  return library;
}

}  // namespace hxcomm
