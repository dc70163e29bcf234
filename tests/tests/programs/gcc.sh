# A library and a program that loads it, compiled and run.
set -eu
cd /data
cat >library.c <<'C'
#include <math.h>
double root(double n) { return sqrt(n); }
C
cat >program.c <<'C'
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
static long sums[4];
static void *add(void *number) {
    for (long i = 0; i < 100000; i++) sums[(long)number] += i % 7;
    return 0;
}
int main(int count, char **words) {
    void *library = dlopen(words[1], RTLD_NOW);
    if (!library) return puts(dlerror()), 1;
    double (*root)(double) = (double (*)(double))dlsym(library, "root");
    pthread_t threads[4];
    for (long i = 0; i < 4; i++) pthread_create(&threads[i], 0, add, (void *)i);
    for (long i = 0; i < 4; i++) pthread_join(threads[i], 0);
    printf("%d %.6f %ld\n", count, root(2), sums[0] + sums[1] + sums[2] + sums[3]);
}
C
gcc -O2 -Wall -Werror -fPIC -shared -o library.so library.c -lm
gcc -O2 -Wall -Werror -o program program.c
./program ./library.so
echo 'int main(void) { return x; }' >wrong.c
! gcc -fsyntax-only wrong.c 2>wrong.log
grep -c "error: .x. undeclared" wrong.log
