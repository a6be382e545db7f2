#include "huge_pages.h"

#include "checks.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace slime_fused::cpu {

void advise_huge_pages(void* address, int64_t bytes) {
  check_at_least(bytes, 0, "bytes");
  if (bytes == 0) return;
  check_pointer(address, "address");
#if defined(__linux__)
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(address) / page * page;
  const auto end = reinterpret_cast<uintptr_t>(address) + static_cast<uintptr_t>(bytes);
  static_cast<void>(madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE));
#endif
}

}  // namespace slime_fused::cpu
