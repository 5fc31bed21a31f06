; A firmware that writes down what CPUID answers on the boot processor and switches the machine off.
; Output, to the debug console (port E9h): records of leaf, subleaf, EAX, EBX, ECX, EDX, four bytes each, little-endian.
; Leaves: all basic and all extended ones up to the highest; subleaves 0 to 31 of leaf 0Dh, 0 to 4 of those that have any,
; 0 of the others. (QEMU 10.0 aborts when a guest asks for subleaf 7 of leaf 1Fh.)

bits 16
org 0
LAST_SUBLEAF equ 4
LAST_OF_XSAVE equ 31

start:
    cli
    cld
    xor eax, eax
    mov ss, ax
    mov ds, ax
    mov es, ax
    mov esp, 0x7000
    xor ebp, ebp
    call range
    mov ebp, 0x80000000
    call range
    mov dx, 0x501               ; isa-debug-exit
    xor eax, eax
    out dx, al
.stop:
    hlt
    jmp .stop

; All leaves from EBP on.
range:
    mov eax, ebp
    xor ecx, ecx
    cpuid
    mov [0x600], eax            ; the highest
.leaf:
    mov dword [0x604], 0        ; the subleaf
.subleaf:
    mov eax, ebp
    mov ecx, [0x604]
    cpuid
    mov [0x610], ebp
    mov esi, [0x604]
    mov [0x614], esi
    mov [0x618], eax
    mov [0x61c], ebx
    mov [0x620], ecx
    mov [0x624], edx
    mov si, 0x610
    mov cx, 24
    mov dx, 0xe9
    rep outsb
    inc dword [0x604]
    mov eax, LAST_OF_XSAVE
    cmp ebp, 0x0d
    je .last
    mov si, with_subleaves
    mov eax, LAST_SUBLEAF
.find:
    cmp [cs:si], ebp
    je .last
    add si, 4
    cmp si, with_subleaves.end
    jne .find
    xor eax, eax
.last:
    cmp [0x604], eax
    jbe .subleaf
    inc ebp
    cmp ebp, [0x600]
    jbe .leaf
    ret

with_subleaves:
    dd 4, 7, 0x0b, 0x14, 0x1d, 0x1e, 0x1f, 0x24, 0x8000001d
.end:

    times 0xfff0 - ($ - $$) db 0
reset:
    jmp 0xf000:start
    times 0x10000 - ($ - $$) db 0
