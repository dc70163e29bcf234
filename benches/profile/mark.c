/* mark 1|2: sets a mark for counter.c, which sees this instruction. */
int main(int argc, char **argv)
{
	if (argc == 2 && argv[1][0] == '1')
		__asm__ volatile(".byte 0x0f, 0x1f, 0x84, 0x00, 'k', 'r', 'x', 1");
	else
		__asm__ volatile(".byte 0x0f, 0x1f, 0x84, 0x00, 'k', 'r', 'x', 2");
	return 0;
}
