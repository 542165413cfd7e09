// Memory of the library's own. It uses nothing of the C++ library that would have to be linked.
#pragma once
#include <stddef.h>
#include <stdlib.h>

#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace headway {

// Memory that takes no room until it is written, on huge pages where there are any.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  ~Buffer() { free(data_); }
  bool make(size_t bytes) {
    constexpr size_t LINE = 64, PAGE = 2 << 20;
    const size_t unit = bytes < PAGE ? LINE : PAGE, size = (bytes + unit - 1) / unit * unit;
    data_ = aligned_alloc(unit, size);
#if defined(__linux__)
    if (data_ != nullptr && unit == PAGE) madvise(data_, size, MADV_HUGEPAGE);
#endif
    return data_ != nullptr;
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
};

}  // namespace headway
