; Real mode (Intel SDM vol. 3, chapter "8086 Emulation"; vol. 2 for each instruction): vectors, flags, segments, wide
; operands in 16-bit code, limits beyond 64 KiB, faults.
%include "common.inc"
align 8
gdt:    usual_segments
        seg CODE16, 0, 0xffff, 0x9b, 0
        seg DATA16, 0, 0xffff, 0x93, 0
        seg DATA4G, 0, 0xfffff, 0x93, 0xc
gdt_end:
more:   ret

; The code below runs at 8000h. Its jumps are relative; its data is at AT(label).
%define AT(label) (0x8000 + ((label) - real))
start:  mov esp, STACK0
        mov al, 0xff
        out 0x21, al
        out 0xa1, al
        mov esi, real
        mov edi, 0x8000
        mov ecx, (real_end - real + 3) / 4
        rep movsd
        lgdt [gdtr]
        mov ax, DATA16
        mov ds, ax
        mov es, ax
        mov fs, ax
        mov gs, ax
        mov ss, ax
        jmp CODE16:0x8000

; case16 NAME: the code up to end16 runs until a vector comes, or reports EBX.
%macro case16 1
%push case
        mov si, AT(%%name)
        mov word [AT(next16)], AT(%$next)
        mov word [AT(base16)], AT(%%begin)
        call begin16
        jmp %%begin
%%name: db %1, 0
%%begin:
%endmacro
%macro end16 0
        jmp nothing16
%$next:
%pop
%endmacro
%macro show16 3
        mov si, AT(%%text)
        call puts16
        mov eax, %2
        mov cl, %3
        call hex16
        jmp %%over
%%text: db %1, 0
%%over:
%endmacro

bits 16
real:   mov eax, cr0
        and al, 0xfe
        mov cr0, eax
        jmp 0:AT(flush)
flush:  xor ax, ax
        mov ds, ax
        mov es, ax
        mov fs, ax
        mov gs, ax
        mov ss, ax
        mov sp, 0x7000
        lidt [AT(ivt)]
        xor bx, bx
        mov ax, AT(stubs16)
vector: mov [bx], ax
        mov word [bx + 2], 0
        add ax, 5
        add bx, 4
        cmp bx, 0x80
        jb vector
        mov word [0x60 * 4], AT(stubs16) + 32 * 5
        mov word [0x60 * 4 + 2], 0

        case16 "div by zero"
        div cl
        end16
        case16 "div overflow"
        mov ax, 0x200
        mov cl, 2
        div cl
        end16
        case16 "int"
        int 0x60
        end16
        case16 "int with interrupts on"
        sti
        int 0x60
        end16
        case16 "int3"
        int3
        end16
        case16 "into"
        mov al, 0x7f
        inc al
        into
        end16
        case16 "bound"
        mov dword [AT(scratch)], 0x00050002
        mov ax, 5
        bound ax, [AT(scratch)]
        mov ax, 6
        bound ax, [AT(scratch)]
        end16
        case16 "ud2"
        ud2
        end16
        case16 "protected-mode instruction"
        sldt ax
        end16
        case16 "arpl"
        db 0x63, 0xc8
        end16
        case16 "lar"
        lar ax, cx
        end16
        case16 "lock of a register"
        db 0xf0, 0x01, 0xc0
        end16
        case16 "single step"
        pushf
        pop ax
        or ah, 1
        push ax
        popf
        inc bx
        inc bx
        end16
        case16 "icebp"
        db 0xf1
        end16
        case16 "x87 with CR0.EM"
        mov eax, cr0
        or al, 4
        mov cr0, eax
        fnop
        end16
        mov eax, cr0
        and al, ~4 & 0xff
        mov cr0, eax
        case16 "address beyond the limit"
        mov eax, [dword 0xfffd]
        end16
        case16 "address far beyond the limit"
        mov eax, 0x10000
        mov al, [eax]
        end16
        case16 "word at the end of the segment"
        mov bx, 0xffff
        mov ax, [bx]
        end16
        case16 "jump beyond the limit"
        mov eax, 0x10000
        jmp eax
        end16
        case16 "index wraps"
        mov byte [0x0fff], 0x5a
        mov bx, 0xffff
        mov bl, [bx + 0x1000]
        end16
        case16 "segment register and offset wrap nowhere"
        mov ax, 0xffff
        mov es, ax
        mov dword [es:0x0fff0 - 0x10], 0xcafe1234
        mov ebx, [es:0xffe0]
        end16
        case16 "segments"
        mov ax, 0x0123
        mov es, ax
        mov word [es:0x10], 0xbeef
        mov bx, [0x1240]
        shl ebx, 16
        mov bx, es
        end16
        case16 "far call and return"
        call 0x0800:(AT(far16) - 0x8000)
        mov bx, ax
        end16
        case16 "far call of a pointer with 32 bits"
        call dword far [AT(pointer)]
        mov ebx, eax
        end16
        case16 "retf with parameters"
        mov bx, sp
        push 0x1111
        push 0x2222
        push cs
        call pops
        sub bx, sp
        end16
        case16 "enter and leave"
        mov bp, 0x1234
        mov bx, sp
        enter 0x20, 3
        sub bx, sp
        shl ebx, 16
        mov bx, bp
        leave
        end16
        case16 "pusha and popa"
        mov ax, 1
        mov cx, 2
        mov dx, 3
        mov di, 4
        pusha
        xor ax, ax
        xor di, di
        popa
        mov bx, ax
        shl ebx, 16
        mov bx, di
        end16
        case16 "wide push and stack pointer"
        mov ebx, esp
        push dword 0x12345678
        sub ebx, esp
        pop eax
        shl ebx, 16
        mov bx, ax
        end16
        case16 "pushf in the 32-bit form"
        pushfd
        pop ebx
        and ebx, 0x3f7200
        end16
        case16 "iret restores flags"
        push 0x7202
        push cs
        push AT(.back)
        iret
.back:  pushf
        pop bx
        cli
        push 2
        popf
        end16
        case16 "strings"
        cld
        mov si, AT(source)
        mov di, 0x7800
        mov cx, 5
        rep movsw
        mov si, AT(source)
        mov di, 0x7800
        mov cx, 9
        repe cmpsb
        mov bx, cx
        shl ebx, 16
        mov bx, di
        end16
        case16 "strings downward, 32-bit addresses"
        std
        mov esi, AT(source) + 8
        mov edi, 0x7808
        mov ecx, 3
        a32 rep movsd
        cld
        mov ebx, edi
        end16
        case16 "string into the vectors' place wraps"
        mov di, 0xfffe
        mov ax, 0x1122
        mov cx, 1
        rep stosw
        mov bx, di
        end16
        case16 "decimal"
        mov ax, 0x0905
        add al, 0x38
        daa
        mov bl, al
        mov ax, 0x0a
        aam
        mov bh, al
        shl ebx, 8
        mov ax, 0x0203
        aad
        mov bl, al
        shl ebx, 8
        mov ax, 0x000b
        aaa
        mov bl, al
        end16
        case16 "xlat and salc"
        mov bx, AT(source)
        mov al, 3
        xlatb
        stc
        mov bl, al
        db 0xd6
        mov bh, al
        end16
        case16 "loop"
        mov cx, 5
.loop:  inc bx
        loop .loop
        jcxz .zero
        mov bx, 0xffff
.zero:  nop
        end16
        case16 "smsw and lmsw"
        smsw bx
        and bx, 0xf
        end16
        case16 "mov to cs"
        db 0x8e, 0xc8
        end16
        case16 "unknown control register"
        db 0x0f, 0x20, 0xc8
        end16
        case16 "msr that is not there"
        mov ecx, 0xc001ffff
        rdmsr
        end16
        case16 "vector beyond the table's limit"
        lidt [AT(short_ivt)]
        int 0x60
        end16
        lidt [AT(ivt)]
        case16 "vectors elsewhere"
        mov dword [0x7c00 + 0x20 * 4], AT(stubs16) + 5 * 5
        lidt [AT(other_ivt)]
        int 0x20
        end16
        lidt [AT(ivt)]

        ; Limits of 4 GiB stay when protection goes.
        cli
        mov eax, cr0
        or al, 1
        mov cr0, eax
        mov bx, DATA4G
        mov fs, bx
        and al, 0xfe
        mov cr0, eax
        case16 "4 GiB limit kept in real mode"
        mov eax, SCRATCH
        mov dword [fs:eax], 0x1234abcd
        mov ebx, [fs:eax]
        end16
        case16 "4 GiB limit kept by a new selector"
        mov ax, 0x100
        mov fs, ax
        mov eax, SCRATCH - 0x1000
        mov ebx, [fs:eax]
        end16
        mov dx, 0x604
        mov ax, 1 << 13
        out dx, ax
        mov ax, 7 << 10 | 1 << 13
        out dx, ax
        jmp $

far16:  mov ax, cs
        retf
far32:  mov eax, [esp]          ; the return address: 32 bits of IP, then CS
        o32 retf
pops:   retf 4

stubs16:
%assign v 0
%rep 33
        push strict byte v
        jmp strict near reported
%assign v v + 1
%endrep
reported:
        push ds
        push es
        pushad
        xor ax, ax
        mov ds, ax
        mov es, ax
        cld
        mov bp, sp
        show16 " v=", [bp + 36], 2
        mov ax, [bp + 38]
        cmp word [bp + 40], 0
        jne .absolute
        sub ax, [AT(base16)]
.absolute:
        movzx ebx, ax
        show16 " ip=", ebx, 4
        show16 " cs=", [bp + 40], 4
        mov bx, [bp + 42]
        and bx, 0x7700
        show16 " fl=", ebx, 4
        show16 " a=", [bp + 28], 8
done16: xor ax, ax
        mov ss, ax
        mov esp, 0x7000
        mov ds, ax
        mov es, ax
        mov al, 10
        call putc16
        jmp [AT(next16)]
nothing16:
        push ebx
        xor ax, ax
        mov ds, ax
        pop ebx
        show16 " nothing b=", ebx, 8
        jmp done16
begin16:
        call puts16
        mov al, ':'
        call putc16
        xor eax, eax
        xor ebx, ebx
        xor ecx, ecx
        xor edx, edx
        ret
puts16: lodsb
        test al, al
        jz .end
        call putc16
        jmp puts16
.end:   ret
putc16: push dx
        push ax
        mov dx, 0x3fd
.wait:  in al, dx
        test al, 0x20
        jz .wait
        mov dx, 0x3f8
        pop ax
        out dx, al
        pop dx
        ret
; EAX in CL digits
hex16:  push ebx
        movzx cx, cl
        mov ebx, eax
        push cx
        neg cx
        add cx, 8
        shl cx, 2
        shl ebx, cl
        pop cx
.more:  rol ebx, 4
        mov al, bl
        and al, 15
        cmp al, 10
        sbb al, 0x69
        das
        or al, 0x20
        call putc16
        loop .more
        pop ebx
        ret

align 4
ivt:    dw 0x3ff
        dd 0
short_ivt: dw 0x17f
        dd 0
other_ivt: dw 0xff
        dd 0x7c00
pointer: dd AT(far32)
        dw 0
next16: dw 0
base16: dw 0
scratch: dd 0
source: db "abcdefghijklmnop"
real_end:
bits 32
